"""raw speech -> tar shards of the original compressed audio and a manifest.

Shards are planned from names and sizes alone, then written side by side on Ray Data; tars that are shards already are only
indexed. Every recording is decoded once to see that it can be; what cannot be used is a row of quarantine.parquet with its
reason. What occurs in two shards is found when all are there (`data/repeats.py`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hubert_ray.asr.transcripts import spellable
from hubert_ray.config.recipe import Corpus, EmbeddedCorpus
from hubert_ray.data.corpora import open_source, plan_shards
from hubert_ray.data.corpora.source import SPLITS, Group
from hubert_ray.data.corpora.tars import WebDatasetSource
from hubert_ray.data.repeats import set_repeats_aside
from hubert_ray.data.shards import Locations, Manifest, index_shard, write_shard
from hubert_ray.distributed.shard_map import shard_map
from hubert_ray.errors import CorpusError
from hubert_ray.stages.context import Work
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage


@dataclass(frozen=True)
class _ShardWriter:
    """Writes one shard: tar, then manifest part, then quarantine part; the last one marks the shard as done."""

    storage: Storage
    path: str
    corpus: Corpus
    plan: dict[str, list[Group]]

    def __call__(self, shard: str) -> dict[str, Any]:
        source = open_source(self.corpus)
        utterances = (utterance for group in self.plan[shard] for utterance in source.read(group))
        checks = self.corpus.checks
        segments = None if isinstance(self.corpus, EmbeddedCorpus) else self.corpus.segments
        if source.shard_bytes:
            tables = write_shard(self.storage, self.path, shard, utterances, checks=checks, segments=segments)
        else:
            tables = index_shard(shard, utterances, checks=checks, segments=segments)
        self.storage.write(f"{self.path}/{layout.part(shard)}", schemas.encode(tables.manifest))
        self.storage.write(f"{self.path}/{_quarantine_part(shard)}", schemas.encode(tables.quarantine))
        return {"utterances": tables.manifest.num_rows}


def prepare_data(work: Work, corpus: Corpus) -> dict[str, Any]:
    """Writes the corpus artifact. Raises CorpusError where the source is unusable as a whole."""
    storage, path = work.storage, work.output.path
    source = open_source(corpus)
    plan = plan_shards(source.groups(), source.shard_bytes)
    _check_unchanged(work, plan)
    if isinstance(source, WebDatasetSource):
        place = source.storage.address
        work.output.write_json(
            layout.LOCATIONS, Locations({shard: (place, group.name) for shard, (group,) in plan.items()})
        )
    missing = [shard for shard in plan if not storage.exists(f"{path}/{_quarantine_part(shard)}")]
    for row in shard_map(partial(_ShardWriter, storage, path, corpus, plan), missing, work.cluster):
        print(f"prepare_data  {row['shard']}  {row['utterances']} utterances", flush=True)
    # Test before dev and dev before train: what is measured on stays whole, and train does not hold it.
    ranked = sorted(plan, key=lambda shard: -SPLITS.index(plan[shard][0].split))
    set_repeats_aside(storage, path, ranked, corpus.checks.reject_duplicates)
    manifest, content = _merge(storage, path, [layout.part(s) for s in plan], layout.MANIFEST, schemas.MANIFEST)
    set_aside = [*map(_quarantine_part, plan), layout.REPEATS]
    quarantine, _ = _merge(storage, path, set_aside, layout.QUARANTINE, schemas.QUARANTINE)
    if not manifest:
        raise CorpusError(f"no usable utterance: all {quarantine} recordings are in {path}/{layout.QUARANTINE}")
    whole = Manifest.read(storage, path, ["split", "text", "speaker"])
    _say_who_is_missing(corpus, set(pc.unique(whole.table["speaker"]).to_pylist()))
    return {
        "utterances": manifest,
        "quarantined": quarantine,
        "shards": len(plan),
        "transcribed": _transcribed(whole),
        "source": getattr(corpus, "path", None),
        "content": content,
    }


def _say_who_is_missing(corpus: Corpus, speakers: set[str]) -> None:
    """Not every source can tell before it has been read that a speaker to be moved is not in it."""
    moved = () if isinstance(corpus, EmbeddedCorpus) else corpus.dev_speakers + corpus.test_speakers
    absent = sorted(set(moved) - speakers)
    if absent:
        print(
            f"warning: corpus.dev_speakers and corpus.test_speakers name {', '.join(absent)}, who have no usable utterance"
        )


def _transcribed(manifest: Manifest) -> dict[str, int]:
    """Utterances with a transcript that the alphabet can spell, per split."""
    return {name: len(spellable(manifest.split(name))[0]) for name in SPLITS}


def _quarantine_part(shard: str) -> str:
    return f"quarantine/{shard}.parquet"


def _check_unchanged(work: Work, plan: dict[str, list[Group]]) -> None:
    """Shards of a begun corpus belong to the recordings that were there then. Raises CorpusError where others are now."""
    listed = hashlib.sha256(msgspec.json.encode(plan)).hexdigest()
    file = work.output.file("plan.sha256")
    if work.storage.exists(file) and work.storage.read(file).decode() != listed:
        raise CorpusError(
            f"'{work.output.path}' was begun from other recordings than are there now (files were added, removed or changed). "
            f"Begin again: hubert-ray remove {work.output.path} --storage '{work.storage.url}'"
        )
    work.storage.write(file, listed.encode())


def _merge(storage: Storage, path: str, parts: list[str], name: str, schema: pa.Schema) -> tuple[int, str]:
    """Concatenates parts to one table, a row group each; memory holds one part. Returns rows and a digest of the parts."""
    rows, digest = 0, hashlib.sha256()
    with storage.create(f"{path}/{name}") as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        for part in parts:
            data = storage.read(f"{path}/{part}")
            digest.update(data)
            table = schemas.decode(data, schema.names)
            writer.write_table(table)
            rows += table.num_rows
    return rows, digest.hexdigest()[:16]
