"""Does prepare_data tell the truth about its corpus? All shards are written here beforehand, so no cluster is needed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import soundfile

from hubert_ray.asr import letters
from hubert_ray.config.cluster import Cluster
from hubert_ray.config.presets import PRESETS
from hubert_ray.config.recipe import AudioFolder, Checks, Corpus, Mix
from hubert_ray.data.corpora import plan_corpus
from hubert_ray.stages.context import Work
from hubert_ray.stages.prepare_data import _merge_quarantine, _ShardWriter, prepare_data
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.artifacts import Artifact, identity_of
from hubert_ray.storage.filesystem import Storage
from tests.corpora import whole_manifest


def recording(file: Path, seed: int, text: str | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.random.default_rng(seed).standard_normal(8000), 16_000, format="FLAC")
    file.with_suffix(".flac").write_bytes(buffer.getvalue())
    if text is not None:
        file.with_suffix(".txt").write_text(text)


def prepared(storage: Storage, corpus: Corpus) -> tuple[dict[str, Any], list[str]]:
    """(the facts of the corpus, its ids)"""
    output = Artifact(storage, layout.corpus(corpus.name), identity_of("prepare_data", {}, {}))
    plan = plan_corpus(corpus)
    write = _ShardWriter(storage, output.path, corpus, plan)
    for shard in plan:
        write(shard)
    recipe = msgspec.structs.replace(PRESETS["demo"], corpus=corpus)
    facts = prepare_data(Work("prepare_data", recipe, Cluster(), output, {}), corpus)
    return facts, whole_manifest(storage, output.path).table["utterance_id"].to_pylist()


def test_a_lax_part_of_a_mix_frees_no_other(tmp_path):
    for part in ("strict", "lax"):
        for seed, name in enumerate(["test/s/a", "train/s/b", "train/s/c"]):
            recording(tmp_path / part / name, seed % 2)  # c is a
    corpus = Mix(
        name="mix",
        parts=(
            AudioFolder(name="strict", path=str(tmp_path / "strict")),
            AudioFolder(name="lax", path=str(tmp_path / "lax"), checks=Checks(reject_duplicates=False)),
        ),
    )
    facts, ids = prepared(Storage(str(tmp_path / "storage")), corpus)
    lax = ["lax/test/s/a", "lax/train/s/b", "lax/train/s/c"]
    assert sorted(ids) == [*lax, "strict/test/s/a", "strict/train/s/b"]
    assert (facts["quarantined"], facts["lost"]) == (1, 0)


def test_one_transcript_that_can_be_spelled_is_enough_of_a_split(tmp_path, monkeypatch):
    for seed in range(6):
        recording(tmp_path / f"audio/train/s/{seed}", seed, text="42" if seed == 0 else "two words")
    for seed in range(9, 12):
        recording(tmp_path / f"audio/train/s{seed}/a", seed, text="not looked at: another shard")
    recording(tmp_path / "audio/test/s/a", 7, text="42")
    recording(tmp_path / "audio/dev/s/a", 8)
    looked, normalise = [], letters.normalise
    monkeypatch.setattr(letters, "normalise", lambda text: looked.append(text) or normalise(text))
    corpus = AudioFolder(name="c", path=str(tmp_path / "audio"), shard_mib=0)  # a shard for each folder
    facts, ids = prepared(Storage(str(tmp_path / "storage")), corpus)
    assert len(ids) == 11
    assert facts["transcribed"] == {"train": True, "dev": False, "test": False}
    assert looked == ["42", *["two words"] * 5, "42"]


def test_lost_is_what_the_corpus_has_not(tmp_path):
    storage = Storage(str(tmp_path))
    spared = ["short_pieces", "bad_alignment", "bad_transcript", "bad_metadata", "duplicate_content"]
    for part, reasons in {"a": [*spared, "silent"], "b": [], "c": ["duplicate_id", "undecodable"]}.items():
        rows = [{"source": "x", "reason": reason, "detail": ""} for reason in reasons]
        storage.write(f"corpora/c/{part}", schemas.encode(pa.Table.from_pylist(rows, schema=schemas.QUARANTINE)))
    assert _merge_quarantine(storage, "corpora/c", ["a", "b", "c"]) == (8, 3)
