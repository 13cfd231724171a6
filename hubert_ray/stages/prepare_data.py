"""raw speech -> tar shards of the original compressed audio, a manifest part for each, and an index of them all.

Shards are planned from names and sizes alone, then written side by side on Ray Data; tars that are shards already are only
indexed. Every recording is decoded once to see that it can be; what cannot be used is a row of quarantine.parquet with its
reason. What occurs in two shards is found when all are there (`data/repeats.py`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hubert_ray.asr.transcripts import spellable
from hubert_ray.config.recipe import Corpus, EmbeddedCorpus, Mix, WebDataset, parts_of
from hubert_ray.data.corpora import PlannedShard, part_of, plan_corpus, read_shard
from hubert_ray.data.corpora.source import SPLITS
from hubert_ray.data.index import Shard, write_index
from hubert_ray.data.repeats import set_repeats_aside
from hubert_ray.data.shards import Locations, Manifest, index_shard, write_shard
from hubert_ray.distributed.shard_map import shard_map
from hubert_ray.errors import CorpusError
from hubert_ray.stages.context import Work
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage

# Reasons for a row of the quarantine table whose speech the corpus has all the same.
_SPARED = pa.array(["short_pieces", "bad_alignment", "bad_transcript", "bad_metadata", "duplicate_content"])


@dataclass(frozen=True)
class _ShardWriter:
    """Writes one shard: tar, then manifest part, then quarantine part; the last one marks the shard as done."""

    storage: Storage
    path: str
    corpus: Corpus
    plan: dict[str, PlannedShard]

    def __call__(self, shard: str) -> dict[str, Any]:
        part = part_of(self.corpus, self.plan[shard])
        utterances = read_shard(self.corpus, self.plan[shard])
        segments = None if isinstance(part, EmbeddedCorpus) else part.segments
        if isinstance(part, WebDataset):
            tables = index_shard(shard, utterances, checks=part.checks, segments=segments)
        else:
            tables = write_shard(self.storage, self.path, shard, utterances, checks=part.checks, segments=segments)
        self.storage.write(f"{self.path}/{layout.manifest_part(shard)}", schemas.encode(tables.manifest))
        self.storage.write(f"{self.path}/{_quarantine_part(shard)}", schemas.encode(tables.quarantine))
        return {"utterances": tables.manifest.num_rows}


def prepare_data(work: Work, corpus: Corpus) -> dict[str, Any]:
    """Writes the corpus artifact. Raises CorpusError where the source is unusable as a whole."""
    storage, path = work.storage, work.output.path
    plan = plan_corpus(corpus)
    _check_unchanged(work, plan)
    tars = {shard: tar for shard, planned in plan.items() if (tar := _tar_in_place(corpus, planned))}
    if tars:
        work.output.write_json(layout.LOCATIONS, Locations(tars))
    missing = [shard for shard in plan if not storage.exists(f"{path}/{_quarantine_part(shard)}")]
    for row in shard_map(partial(_ShardWriter, storage, path, corpus, plan), missing, work.cluster):
        print(f"prepare_data  {row['shard']}  {row['utterances']} utterances", flush=True)
    # Test before dev and dev before train: what is measured on stays whole, and train does not hold it.
    ranked = sorted(plan, key=lambda shard: -SPLITS.index(plan[shard].split))
    set_repeats_aside(storage, path, {shard: part_of(corpus, plan[shard]).checks.reject_duplicates for shard in ranked})
    quarantined, lost = _merge_quarantine(storage, path, [*map(_quarantine_part, plan), layout.REPEATS])
    transcribed, absent = dict.fromkeys(SPLITS, False), _moved_speakers(corpus)

    def look(shard: Shard, part: pa.Table) -> None:
        """Looks for one transcript of each split that the alphabet can spell, and crosses off the speakers who are there."""
        transcribed[shard.split] = transcribed[shard.split] or len(spellable(Manifest(part))[0]) > 0
        absent.difference_update(pc.unique(part["speaker"]).to_pylist())

    index = write_index(storage, path, ((name, shard.split, shard.part) for name, shard in plan.items()), look)
    if not len(index):
        raise CorpusError(f"no usable utterance: all {quarantined} recordings are in {path}/{layout.QUARANTINE}")
    if absent:
        print(
            f"warning: corpus.dev_speakers and corpus.test_speakers name {', '.join(sorted(absent))}, "
            "who have no usable utterance"
        )
    return {
        "utterances": len(index),
        "quarantined": quarantined,
        "lost": lost,
        "shards": len(plan),
        "transcribed": transcribed,
        "sources": {part.name: getattr(part, "path", None) for part in parts_of(corpus)},
        "content": index.contents.digest,
    }


def _tar_in_place(corpus: Corpus, shard: PlannedShard) -> tuple[str, str] | None:
    """(storage, path) of a tar that is a shard where it lies."""
    part = part_of(corpus, shard)
    return (_address(part.path), shard.groups[0].name) if isinstance(part, WebDataset) else None


@lru_cache
def _address(path: str) -> str:
    """Of the folder that holds the tars: one look at the storage for all of them."""
    return Storage.of(path)[0].address


def _moved_speakers(corpus: Corpus) -> set[str]:
    """As the manifest names them. Not every source can tell before it has been read whether it has them."""
    return {
        f"{part.name}/{speaker}" if isinstance(corpus, Mix) else speaker
        for part in parts_of(corpus)
        if not isinstance(part, EmbeddedCorpus)
        for speaker in part.dev_speakers + part.test_speakers
    }


def _quarantine_part(shard: str) -> str:
    return f"quarantine/{shard}.parquet"


def _check_unchanged(work: Work, plan: dict[str, PlannedShard]) -> None:
    """Shards of a begun corpus belong to the recordings that were there then. Raises CorpusError where others are now."""
    digest = hashlib.sha256()
    for planned in plan.items():
        digest.update(ascii(planned).encode())  # a name that was not UTF-8 when it was listed has no other bytes
    listed = digest.hexdigest()
    file = work.output.file("plan.sha256")
    if work.storage.exists(file) and work.storage.read(file).decode() != listed:
        raise CorpusError(
            f"'{work.output.path}' was begun from other recordings than are there now (files were added, removed or changed). "
            f"Begin again: hubert-ray remove {work.output.path} --storage '{work.storage.url}'"
        )
    work.storage.write(file, listed.encode())


def _merge_quarantine(storage: Storage, path: str, parts: list[str]) -> tuple[int, int]:
    """Concatenates the quarantine parts to one table, a row group each; memory holds one part.

    Returns how many rows it has, and how many of them tell of a recording whose speech the corpus has not.
    """
    rows = lost = 0
    with storage.create(f"{path}/{layout.QUARANTINE}") as stream:
        with pq.ParquetWriter(stream, schemas.QUARANTINE, compression="zstd") as writer:
            for part in parts:
                table = schemas.decode(storage.read(f"{path}/{part}"), schemas.QUARANTINE.names)
                writer.write_table(table)
                rows += table.num_rows
                lost += table.num_rows - pc.sum(pc.is_in(table["reason"], _SPARED), min_count=0).as_py()
    return rows, lost
