"""Which recordings make up a corpus? Sources list groups of utterances; groups are packed into shards by size.

Extension point: a new source is a class with `groups()` (cheap: names and sizes only) and `read(group)` (the bytes), a
settings struct in config/recipe.py, and a line in `open_source`. What lies in a folder or a bucket derives from
`source.Placed`, which finds, reads and names files on either. A group is the smallest piece that one worker reads alone: a
chapter, a row group, five hundred lines of a table. What `read` cannot use it yields as `Rejected`; the rest of the group
goes on. Whether audio is usable is not the source's business (`data/audio.py`, by the corpus's `Checks`), nor whether it
was there before (`data/shards.py` within a shard, `data/repeats.py` between shards).

    trees.py    LibriSpeech, Libri-light; any folder of recordings
    tables.py   CSV, TSV and JSONL tables of paths; Parquet with the audio in a column
    tars.py     WebDataset tars, indexed where they lie
    embedded.py the synthetic corpus
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from hubert_ray.config.recipe import (
    AudioFolder,
    AudioTable,
    Corpus,
    EmbeddedCorpus,
    LibriSpeech,
    Mix,
    Parquet,
    Part,
    WebDataset,
    parts_of,
)
from hubert_ray.data.corpora.embedded import EmbeddedSource
from hubert_ray.data.corpora.source import SPLITS, Group, Source
from hubert_ray.data.corpora.tables import AudioTableSource, ParquetSource
from hubert_ray.data.corpora.tars import WebDatasetSource
from hubert_ray.data.corpora.trees import AudioFolderSource, LibriSpeechSource
from hubert_ray.data.shards import RawUtterance, Rejected


def open_source(corpus: Part) -> Source:
    """The source of a corpus. Raises CorpusError where it is missing or not of its kind."""
    match corpus:
        case EmbeddedCorpus():
            return EmbeddedSource(corpus)
        case LibriSpeech():
            return LibriSpeechSource(corpus)
        case AudioFolder():
            return AudioFolderSource(corpus)
        case AudioTable():
            return AudioTableSource(corpus)
        case Parquet():
            return ParquetSource(corpus)
        case WebDataset():
            return WebDatasetSource(corpus)


@dataclass(frozen=True)
class PlannedShard:
    """What one audio shard is to hold."""

    part: str  # of a mix; "" where the corpus is none
    split: str
    groups: list[Group]


def plan_corpus(corpus: Corpus) -> dict[str, PlannedShard]:
    """Shard name -> what it holds, split by split and in each split part by part, which is the order of the index."""
    shards = []
    for part in parts_of(corpus):
        source, named = open_source(part), f"{part.name}-" if isinstance(corpus, Mix) else ""
        for shard, groups in plan_shards(source.groups(), source.shard_bytes).items():
            shards.append((named + shard, PlannedShard(part.name if named else "", groups[0].split, groups)))
    return dict(sorted(shards, key=lambda shard: SPLITS.index(shard[1].split)))  # a stable sort: parts keep their order


def part_of(corpus: Corpus, shard: PlannedShard) -> Part:
    """The corpus that a shard's recordings come from."""
    return next(part for part in parts_of(corpus) if shard.part in ("", part.name))


def read_shard(corpus: Corpus, shard: PlannedShard) -> Iterator[RawUtterance | Rejected]:
    """The recordings of a shard; those of a mix with their part's name in front of ids and speakers."""
    source = _opened(part_of(corpus, shard))
    for group in shard.groups:
        for found in source.read(group):
            if not shard.part:
                yield found
            elif isinstance(found, Rejected):
                yield replace(found, source=f"{shard.part}/{found.source}")
            else:
                speaker = found.speaker and f"{shard.part}/{found.speaker}"  # "" is an unknown one
                yield replace(found, utterance_id=f"{shard.part}/{found.utterance_id}", speaker=speaker)


@lru_cache(maxsize=8)
def _opened(part: Part) -> Source:
    """A process opens a part once for all shards that it reads: what the source has learnt of its folder or files stays."""
    return open_source(part)


def plan_shards(groups: list[Group], shard_bytes: int) -> dict[str, list[Group]]:
    """Shard name -> its groups: each split's groups in order of their names, a new shard when one is full.

    Depends on the corpus only, so the same shards come out on any number of workers. With 0 bytes every group is a shard.
    """
    shards: dict[str, list[Group]] = {}
    for split in SPLITS:
        number, filled = -1, 0
        for group in sorted((g for g in groups if g.split == split), key=lambda g: g.name):
            if number < 0 or not shard_bytes or (filled and filled + group.bytes > shard_bytes):
                number, filled = number + 1, 0
            shards.setdefault(f"{split}-{number:05d}", []).append(group)
            filled += group.bytes
    return shards
