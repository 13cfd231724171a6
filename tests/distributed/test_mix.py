"""A mix of two corpora from its audio to a trained model; another balance of it trains on other batches of the same corpus."""

from __future__ import annotations

import pytest

from hubert_ray import pipeline
from hubert_ray.config.cluster import Cluster
from hubert_ray.config.loading import load_recipe
from hubert_ray.data.index import Index
from hubert_ray.distributed.cluster import connected
from hubert_ray.storage import layout
from hubert_ray.storage.filesystem import Storage
from tests.conftest import SMOKE

pytestmark = pytest.mark.slow

PART = "{{kind='embedded', name='{}', train_speakers={}, dev_speakers=1, test_speakers=1, utterances_per_speaker=4, seed={}}}"
PARTS = f"[{PART.format('one', 3, 1)}, {PART.format('two', 1, 2)}]"
RECIPE = [
    f"corpus={{kind='mix', name='both', parts={PARTS}}}", "finetune=false", "decode=false",
    "iterations.iter1.pretrain.steps=3", "iterations.iter1.kmeans.max_iterations=3",
]  # fmt: skip


def test_a_mix_is_prepared_labelled_and_trained_on(tmp_path, ray_local):
    storage = Storage(str(tmp_path))

    def run(name: str, *overrides: str) -> dict[str, bool]:
        """Whether each stage was skipped."""
        recipe = load_recipe(str(SMOKE), [*RECIPE, f"name={name}", *overrides])
        skipped = {}
        for stage in ("prepare_data", "iter1/learn_kmeans", "iter1/assign_labels", "iter1/pretrain"):
            for step, _, was_skipped in pipeline.run(recipe, storage, Cluster(), connected(Cluster()), stage):
                skipped[step.stage.name] = was_skipped
        return skipped

    assert not any(run("plain").values())
    index = Index.open(storage, "corpora/both")
    assert {name: rows.stop - rows.start for name, rows in index.split("train").by_part().items()} == {
        "one": 12,
        "two": 4,
    }
    assert [index.id_of(storage, "corpora/both", row).split("/")[0] for row in (0, 11, 12, 15)] == [
        "one",
        "one",
        "two",
        "two",
    ]
    assert index.contents.shared_speakers == ()
    again = run("plain", "iterations.iter1.pretrain.dataset_alpha=0.0", "name=balanced")
    assert again["prepare_data"]
    plain, balanced = (f"runs/{name}/iter1/pretrain/{layout.MODEL}" for name in ("plain", "balanced"))
    assert storage.read(plain) != storage.read(balanced), "the balance does not reach the training"
