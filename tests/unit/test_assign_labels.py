"""Does a worker of assign_labels give every utterance its own labels, in whatever company and order it is computed?"""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch

from hubert_ray.config.recipe import Layer, Mfcc
from hubert_ray.config.sizes import TINY
from hubert_ray.data import audio
from hubert_ray.data.shards import write_shard
from hubert_ray.formats.native import ModelCard
from hubert_ray.model.hubert import Encoder
from hubert_ray.stages.assign_labels import Labeller
from hubert_ray.stages.context import ModelAt, TeacherAt
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage
from hubert_ray.units import features
from hubert_ray.units.kmeans import Codebook, assign
from tests.unit.test_shards import CORPUS, utterance

SEEDS = [9, 2, 14, 0, 5, 11]  # lengths rise with the seed: not sorted


@pytest.fixture
def storage(tmp_path) -> Storage:
    storage = Storage(str(tmp_path))
    table = write_shard(storage, CORPUS, "s", [utterance(f"u{n}", seed) for n, seed in enumerate(SEEDS)]).manifest
    storage.write(f"{CORPUS}/{layout.manifest_part('s')}", schemas.encode(table))
    torch.manual_seed(0)
    size = msgspec.structs.replace(TINY, layers=1)
    weights = {f"encoder.{name}": value for name, value in Encoder(size).state_dict().items()}
    storage.write(f"model/{layout.MODEL_CONFIG}", msgspec.json.encode(ModelCard("hubert", size)))
    storage.write(f"model/{layout.MODEL}", safetensors.torch.save(weights))
    return storage


@pytest.mark.parametrize("teacher", [Mfcc(), Layer(of="x", layer=1)], ids=["mfcc", "layer"])
@pytest.mark.parametrize("seconds", [0.2, 60.0])  # of a group: one utterance, all of them
def test_labels_are_those_of_each_utterance_alone(storage, monkeypatch, teacher, seconds):
    monkeypatch.setattr(features, "GROUP_SECONDS", seconds)
    at = TeacherAt(teacher, ModelAt(storage, "model"))
    extractor, rng = at.open(), np.random.default_rng(0)
    alone = [extractor([audio.decode(utterance("x", seed).audio)])[0] for seed in SEEDS]
    centroids_KD = rng.permutation(np.concatenate(alone))[:12]
    facts = Labeller(storage, CORPUS, "labels", at, Codebook(centroids_KD, (12,)), "cpu")("s")
    table = schemas.decode(storage.read(f"labels/{layout.part('s')}"))
    assert table["utterance_id"].to_pylist() == [f"u{n}" for n in range(len(SEEDS))]
    assert table["frame_rate_hz"].unique().to_pylist() == [extractor.frame_rate_hz]
    for got, frames_FD in zip(table["labels"].to_pylist(), alone, strict=True):
        assert got == assign(frames_FD, centroids_KD)[0].tolist()
    counted = np.bincount(np.concatenate(table["labels"].to_pylist()), minlength=12).tolist()
    digest = storage.sha256(f"labels/{layout.part('s')}")
    told = {"there": False, "sha256": digest, "labels": sum(map(len, alone)), "histograms": [counted], "phones": [{}]}
    assert facts == told
    assert len({tuple(labels) for labels in table["labels"].to_pylist()}) == len(set(SEEDS))


def test_a_part_that_is_there_is_counted_not_made_again(storage):
    """Its labels by stream, and against the phones of the utterances that have them, whatever the order of the rows."""
    part, manifest = f"labels/{layout.part('s')}", f"{CORPUS}/{layout.manifest_part('s')}"
    spoken = [
        None,
        [{"start": 0, "end": 480, "phone": "AH1"}],
        None,
        [{"start": 160, "end": 320, "phone": "T"}],
        None,
        [],
    ]
    table = schemas.decode(storage.read(manifest))
    place = schemas.MANIFEST.get_field_index("phones")
    field = schemas.MANIFEST.field("phones")
    storage.write(manifest, schemas.encode(table.set_column(place, field, pa.array(spoken, field.type))))
    streams = {f"u{n}": np.array([[n, 0], [0, 1], [n, 2]]) for n in reversed(range(len(SEEDS)))}
    rows = [{"utterance_id": u, "labels": s_FS.ravel(), "frame_rate_hz": 100} for u, s_FS in streams.items()]
    storage.write(part, schemas.encode(pa.Table.from_pylist(rows, schema=schemas.LABELS)))
    before = storage.read(part)
    codebook = Codebook(np.zeros((6 + 3, 39), dtype=np.float32), (6, 3))
    facts = Labeller(storage, CORPUS, "labels", TeacherAt(Mfcc(), None), codebook, "cpu")("s")
    assert storage.read(part) == before
    assert facts == {
        "there": True,
        "sha256": hashlib.sha256(before).hexdigest(),
        "labels": 6 * len(SEEDS),
        "histograms": [[8, 2, 2, 2, 2, 2], [6, 6, 6]],
        "phones": [
            {"AH": [1, 2, 0, 0, 0, 0], "T": [1, 0, 0, 0, 0, 0]},
            {"AH": [1, 1, 1], "T": [0, 1, 0]},
        ],
    }
