"""learn_kmeans and assign_labels on real audio: the number of workers, a lost one and a second start change no byte."""

from __future__ import annotations

import io

import msgspec
import numpy as np
import pyarrow.compute as pc
import pytest

from hubert_ray import pipeline
from hubert_ray.config.cluster import Cluster
from hubert_ray.config.loading import load_recipe
from hubert_ray.data.frames import mfcc_frames_of
from hubert_ray.data.shards import AudioReader, Manifest
from hubert_ray.distributed.cluster import connected
from hubert_ray.storage import layout, schemas
from hubert_ray.units import kmeans
from hubert_ray.units.features import MfccExtractor
from tests.conftest import SMOKE

pytestmark = pytest.mark.slow


def run(storage, name, stage, **cluster):
    settings = Cluster(**cluster)
    recipe = load_recipe(str(SMOKE), [f"name={name}", "iterations.iter1.kmeans.max_iterations=6"])
    for step, seal, _ in pipeline.run(recipe, storage, settings, connected(settings), f"iter1/{stage}"):
        return step.artifact, seal


@pytest.fixture(scope="module")
def reference(corpus):
    storage, _ = corpus
    codebook, _ = run(storage, "one", "learn_kmeans", kmeans_workers=1, data_workers=1)
    labels, seal = run(storage, "one", "assign_labels", data_workers=1)
    return codebook.read(layout.CENTROIDS), labels, seal


def test_labels_fit_the_audio_and_are_good(corpus, reference):
    storage, path = corpus
    _, labels, seal = reference
    manifest = Manifest.read(storage, path)
    found = 0
    for shard in manifest.shards():
        part = schemas.decode(labels.read(layout.part(shard)))
        rows = Manifest.read_shard(storage, path, shard)
        assert part["utterance_id"].to_pylist() == rows.table["utterance_id"].to_pylist()
        counts = pc.list_value_length(part["labels"]).to_pylist()
        assert counts == [mfcc_frames_of(int(samples)) for samples in rows.numbers("samples")]
        assert pc.unique(part["frame_rate_hz"]).to_pylist() == [100]
        found += part.num_rows
    assert found == len(manifest)
    assert seal.facts["quality"]["pnmi"] > 0.3  # twenty clusters of MFCC on clean synthetic speech
    assert 0.5 < seal.facts["unigram_entropy_bits"] <= np.log2(20)


def test_more_workers_give_the_same_bytes(corpus, reference):
    storage, _ = corpus
    codebook, _ = run(storage, "many", "learn_kmeans", kmeans_workers=3, data_workers=3, data_cpus=0.5)
    assert codebook.read(layout.CENTROIDS) == reference[0]
    labels, _ = run(storage, "many", "assign_labels", data_workers=3, data_cpus=0.5)
    for part in storage.list(f"{labels.path}/parts"):
        assert storage.read(f"{labels.path}/parts/{part}") == storage.read(f"{reference[1].path}/parts/{part}")


def test_codebook_is_fitted_on_every_train_frame_and_no_other(corpus, reference):
    storage, path = corpus
    train = Manifest.read(storage, path).split("train")
    expected = sum(mfcc_frames_of(int(samples)) for samples in train.numbers("samples"))
    assert msgspec.json.decode(storage.read("runs/one/iter1/learn_kmeans/history.json"))["frames"] == expected
    assert reference[2].facts["train_frames"] == expected
    centroids = np.load(io.BytesIO(reference[0]))
    reader, extract = AudioReader(storage, path), MfccExtractor()
    rows = train.table.select(["shard", "offset", "size"]).to_pylist()
    frames = np.concatenate(extract([reader.wave(**row) for row in rows]))
    recorded = storage.read("runs/one/iter1/learn_kmeans/history.json")
    inertia = kmeans.partial(frames, centroids).inertia / len(frames)
    assert inertia == pytest.approx(msgspec.json.decode(recorded)["streams"][0]["inertia_history"][-1], rel=1e-5)


def test_finished_parts_are_not_made_again(corpus, reference, monkeypatch):
    """Unsealed labels with one part missing: only that part is written."""
    storage, _ = corpus
    run(storage, "again", "learn_kmeans")
    labels, _ = run(storage, "again", "assign_labels")
    parts = storage.list(f"{labels.path}/parts")
    lost, kept = parts[0], parts[1:]
    before = {
        name: storage.filesystem.get_file_info(storage.full(f"{labels.path}/parts/{name}")).mtime_ns for name in kept
    }
    expected = storage.read(f"{labels.path}/parts/{lost}")
    storage.delete(labels.file(layout.SEAL))
    storage.delete(f"{labels.path}/parts/{lost}")
    run(storage, "again", "assign_labels")
    after = {
        name: storage.filesystem.get_file_info(storage.full(f"{labels.path}/parts/{name}")).mtime_ns for name in kept
    }
    assert after == before
    assert storage.read(f"{labels.path}/parts/{lost}") == expected
