"""`hubert-ray layers` and `stability` on a real corpus: any number of workers, what is there is kept, and what they say."""

from __future__ import annotations

import msgspec
import pytest
import torch

from hubert_ray import pipeline
from hubert_ray.cli import main
from hubert_ray.config.cluster import Cluster
from hubert_ray.config.loading import load_recipe
from hubert_ray.config.recipe import Layer, Mfcc
from hubert_ray.config.sizes import TINY
from hubert_ray.distributed.cluster import connected
from hubert_ray.errors import RecipeError, UnsealedArtifactError
from hubert_ray.formats.checkpoint import Checkpoint
from hubert_ray.model.hubert import Encoder
from hubert_ray.speech_model import SpeechModel
from tests.conftest import SMOKE

pytestmark = pytest.mark.slow
MODEL = "public/tiny"
SMALL = msgspec.structs.replace(TINY, layers=2, conv_channels=32, dim=32, ffn_dim=64)


@pytest.fixture(scope="module")
def storage(corpus):
    storage, _ = corpus
    torch.manual_seed(0)
    SpeechModel(Checkpoint(SMALL, Encoder(SMALL).state_dict())).store(storage, MODEL)
    return storage


def study(storage, kind, run, models=(MODEL,), workers=2, **settings):
    recipe, cluster = load_recipe(str(SMOKE), [f"name={run}"]), Cluster(data_workers=workers, data_cpus=0.5)
    pipeline.study(kind, recipe, storage, cluster, connected(cluster), models, settings)
    return msgspec.json.decode(storage.read(f"runs/{run}/{kind}/{kind}.json"))


def changed(storage, folder):
    return {
        name: storage.filesystem.get_file_info(storage.full(f"{folder}/{name}")).mtime_ns
        for name in storage.list(folder)
    }


def test_layers_of_any_number_of_workers_and_of_a_second_start(storage, capsys):
    settings = {"clusters": [5, 20], "hours": 0.01, "seeds": 2, "abx": False}
    one = study(storage, "layers", "study", workers=1, **settings)
    assert [(row["model"], row["layer"], row["clusters"]) for row in one["rows"]] == [
        (MODEL, layer, k) for layer in (0, 1, 2) for k in (5, 20)
    ]
    assert all(0 < row["pnmi"] < 1 and 0 < row["phone_purity"] < 1 for row in one["rows"])
    said = capsys.readouterr().out
    chosen = one["choice"]
    assert f'teacher = {{kind = "layer", of = "{MODEL}", layer = {chosen["layer"]}}}' in said
    assert "12 of 12 cells to measure" in said
    assert study(storage, "layers", "many", workers=6, **settings) == one

    folder = "runs/study/layers/cells"
    before = changed(storage, folder)
    lost = next(iter(before))
    storage.delete(f"{folder}/{lost}")
    assert study(storage, "layers", "study", **settings) == one
    assert "1 of 12 cells to measure" in capsys.readouterr().out
    after = changed(storage, folder)
    assert {name: time for name, time in after.items() if name != lost} == {
        name: time for name, time in before.items() if name != lost
    }
    study(storage, "layers", "study", **settings | {"clusters": [5]})
    assert "to measure" not in capsys.readouterr().out


def test_stability_over_features_clusters_hours_and_seeds(storage):
    found = study(
        storage,
        "stability",
        "study",
        features=[Mfcc(), Layer(of=MODEL, layer=2)],
        clusters=[10],
        hours=[0.004, 0.008],
        seeds=3,
    )
    rows = {(row["features"], row["hours"]): row for row in found["rows"]}
    assert set(rows) == {(name, hours) for name in ("MFCC", f"{MODEL} layer 2") for hours in (0.004, 0.008)}
    for row in rows.values():
        for figure in ("pnmi", "inertia"):
            values = torch.tensor(row[figure]["values"], dtype=torch.float64)
            assert len(values) == len(set(values.tolist())) == 3
            assert row[figure]["mean"] == pytest.approx(float(values.mean()))
            assert row[figure]["std"] == pytest.approx(float(values.std()))
    text = storage.read("runs/study/stability/stability.md").decode()
    assert f"| MFCC                | 10 | {rows['MFCC', 0.004]['pnmi']['mean']:.4f} ± " in text
    assert storage.read("runs/study/stability/stability.svg").startswith(b"<svg ")


@pytest.mark.parametrize(
    ("kind", "models", "settings", "error", "says"),
    [
        (
            "layers",
            [MODEL],
            {"clusters": [5], "hours": 50.0, "seeds": 1, "abx": False},
            RecipeError,
            "50 hours of audio .* ask for less",
        ),
        (
            "layers",
            ["no/model"],
            {"clusters": [5], "hours": 0.01, "seeds": 1, "abx": False},
            UnsealedArtifactError,
            "no/model",
        ),
        (
            "stability",
            [MODEL],
            {"features": [Layer(of=MODEL, layer=3)], "clusters": [5], "hours": [0.01], "seeds": 1},
            RecipeError,
            "layer 3 .* layers 0 .input. to 2",
        ),
    ],
)
def test_what_cannot_be_studied_is_said_before_anything_is_measured(storage, kind, models, settings, error, says):
    with pytest.raises(error, match=says):
        study(storage, kind, "refused", models, **settings)
    assert storage.list("runs/refused", recursive=True) == []


def test_the_commands_find_the_models_and_refuse_what_they_do_not_know(storage, capsys):
    there = ["--recipe", str(SMOKE), "--storage", storage.url]
    assert main(["layers", *there]) == 1
    assert "no model of smoke is finished" in capsys.readouterr().err
    assert main(["stability", *there, "--features", "iter1"]) == 1
    assert "expected mfcc, or a model and a layer such as iter1:6" in capsys.readouterr().err
    for wrong in (["--clusters", "100,1"], ["--hours", "0"], ["--seeds", "0"], ["--clusters", "many"]):
        with pytest.raises(SystemExit):
            main(["stability", *there, *wrong])
        assert "Expected `" in capsys.readouterr().err
    small = ["--hours", "0.004", "--seeds", "2", "--clusters", "5", "--set", "name=typed"]
    assert main(["stability", *there, *small]) == 0
    assert "| MFCC" in capsys.readouterr().out
