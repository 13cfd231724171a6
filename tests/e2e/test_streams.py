"""A product codebook and a cluster ensemble through a whole run: codebook, labels, model, report, doctor, other tools' files."""

from __future__ import annotations

import io

import msgspec
import numpy as np
import pytest

import hubert_ray
from hubert_ray import pipeline
from hubert_ray.config.cluster import Cluster
from hubert_ray.config.loading import load_recipe
from hubert_ray.data.collate import UtteranceReader
from hubert_ray.data.index import Index
from hubert_ray.data.labels import LabelStore
from hubert_ray.data.shards import AudioReader
from hubert_ray.distributed import telemetry
from hubert_ray.distributed.cluster import connected
from hubert_ray.stages.context import ModelAt
from hubert_ray.storage import layout
from hubert_ray.units import kmeans
from hubert_ray.units.features import LayerExtractor, MfccExtractor
from tests.conftest import SMOKE
from tests.corpora import whole_manifest

pytestmark = pytest.mark.slow
PRODUCT, ENSEMBLE = (12, 10, 8), (8, 20)
OVERRIDES = [
    "name=streams", "finetune=false", "decode=false",
    "iterations.iter1.teacher.splice=3", f"iterations.iter1.kmeans.clusters={list(PRODUCT)}",
    "iterations.iter1.kmeans.product=true",
    f"iterations.iter2.kmeans.clusters={list(ENSEMBLE)}", "iterations.iter2.kmeans.restarts=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(corpus):
    """(storage, recipe, folder of the run) of two finished iterations: of a product codebook, and of an ensemble on a layer."""
    storage, _ = corpus
    recipe = load_recipe(str(SMOKE), OVERRIDES)
    for _ in pipeline.run(recipe, storage, Cluster(), connected(Cluster())):
        pass
    return storage, recipe, "runs/streams"


def frames_of_one(storage, recipe, teacher) -> tuple[np.ndarray, int]:
    """(features, row) of a train utterance."""
    train = whole_manifest(storage, f"corpora/{recipe.corpus.name}").split("train")
    reader = UtteranceReader(AudioReader(storage, f"corpora/{recipe.corpus.name}"), train, normalize=False)
    return teacher([reader.wave(5)])[0], 5


def labels_of_one(storage, recipe, folder, rate, streams, row) -> np.ndarray:
    corpus = f"corpora/{recipe.corpus.name}"
    index = Index.open(storage, corpus).split("train")
    return LabelStore(storage, corpus, f"{folder}/assign_labels", index, rate, streams).window(row, slice(None))


def test_labels_are_the_nearest_centroids_of_each_stream(run):
    storage, recipe, folder = run
    frames, row = frames_of_one(storage, recipe, MfccExtractor(recipe.iterations[0].teacher))
    assert frames.shape[1] == 117
    centroids = np.load(io.BytesIO(storage.read(f"{folder}/iter1/learn_kmeans/{layout.CENTROIDS}")))
    assert centroids.shape == (sum(PRODUCT), 39)
    labels = labels_of_one(storage, recipe, f"{folder}/iter1", 100, 3, row)
    for stream, (table, subspace) in enumerate(
        zip(np.split(centroids, [12, 22]), np.split(frames, 3, axis=1), strict=True)
    ):
        assert np.array_equal(labels[:, stream], kmeans.assign(subspace, table)[0])

    teacher = LayerExtractor(ModelAt(storage, f"{folder}/iter1/pretrain").encoder(), recipe.iterations[1].teacher.layer)
    frames, row = frames_of_one(storage, recipe, teacher)
    centroids = np.load(io.BytesIO(storage.read(f"{folder}/iter2/learn_kmeans/{layout.CENTROIDS}")))
    assert centroids.shape == (sum(ENSEMBLE), frames.shape[1])
    labels = labels_of_one(storage, recipe, f"{folder}/iter2", 50, 2, row)
    for stream, table in enumerate(np.split(centroids, [8])):
        same = labels[:, stream] == kmeans.assign(frames, table)[0]
        assert same.mean() > 0.98  # another number of threads rounds otherwise


def test_the_models_have_a_table_of_codewords_per_stream(run):
    storage, _, folder = run
    for name, classes in (("iter1", PRODUCT), ("iter2", ENSEMBLE)):
        card = ModelAt(storage, f"{folder}/{name}/pretrain").card()
        assert tuple(map(len, card.classes)) == classes
        model = hubert_ray.load(storage.full(f"{folder}/{name}/pretrain"))
        assert model.checkpoint.prediction["codewords"].shape[0] == sum(classes)
        (first, *_) = telemetry.read(storage, f"{folder}/{name}/pretrain")
        chance = np.mean(np.log2(classes))  # bits a prediction, a mean over the streams
        assert first["loss_bits"] == pytest.approx(chance, abs=0.8)


def test_the_report_tells_each_stream(run):
    storage, _, folder = run
    report = msgspec.json.decode(storage.read(f"{folder}/report/report.json"))
    for iteration, classes in zip(report["iterations"], (PRODUCT, ENSEMBLE), strict=True):
        assert iteration["clusters"] == list(classes)
        streams = iteration["streams"]
        assert [stream["clusters"] for stream in streams] == list(classes)
        for stream, clusters in zip(streams, classes, strict=True):
            assert 0 < stream["quality"]["pnmi"] < 1
            assert max(stream["unit_by_phone"]["units"]) < clusters
            assert 0 < stream["unigram_entropy_bits"] <= np.log2(clusters)
        for figure in ("pnmi", "phone_purity", "cluster_purity"):
            mean = np.mean([stream["quality"][figure] for stream in streams])
            assert iteration["quality"][figure] == pytest.approx(mean)
        entropies = [stream["unigram_entropy_bits"] for stream in streams]
        assert iteration["pretrain"]["unigram_entropy_bits"] == pytest.approx(np.mean(entropies))
        assert len(iteration["layers"]) == 5
    assert [len(stream["codebook"]["restarts"]) for stream in report["iterations"][1]["streams"]] == [2, 2]
    page = storage.read(f"{folder}/report/report.html").decode()
    assert "12 + 10 + 8 units" in page
    assert "2 label streams" in page


def test_the_doctor_finds_it_healthy(run):
    storage, recipe, _ = run
    findings = list(pipeline.examine(recipe, storage, Cluster(), []))
    assert {finding.check: finding.found for finding in findings if finding.status == "failed"} == {}
    told = {finding.check: finding.found for finding in findings}
    assert "every utterance has 3 labels per frame at 100 Hz" in told["iter1.labels.lengths"]
    assert "the recipe has 8 + 20 clusters" in told["iter2.codebook.centroids"]


def test_fairseq_gets_a_dictionary_per_stream(run, tmp_path):
    storage, _, folder = run
    model = hubert_ray.load(storage.full(f"{folder}/iter2/pretrain"))
    files = model.save("fairseq", str(tmp_path / "fairseq"))
    assert [file.name for file in files] == ["model.pt", "dict.km0.txt", "dict.km1.txt"]
    again = hubert_ray.load(str(tmp_path / "fairseq/model.pt")).checkpoint
    assert tuple(len(symbols) - 4 for symbols in again.classes) == ENSEMBLE  # fairseq's dictionaries have four specials
    found = again.prediction["codewords"].split([12, 24])
    written = model.checkpoint.prediction["codewords"].split([8, 20])
    assert all(bool((theirs[4:] == ours).all()) for theirs, ours in zip(found, written, strict=True))
