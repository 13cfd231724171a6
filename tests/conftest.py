"""Shared by tests that need Ray or a corpus: one local Ray, and one small corpus with labels, made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")

SMOKE = Path(__file__).parent / "e2e" / "smoke.toml"


@pytest.fixture(scope="session")
def ray_local():
    """A Ray of this machine with four logical CPUs, so that several workers fit on two cores."""
    import logging

    import ray

    ray.init(
        num_cpus=4,
        object_store_memory=256 * 2**20,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, ray_local):
    """(storage, path) of the smoke recipe's corpus, prepared for real."""
    from hubert_ray import pipeline
    from hubert_ray.config.cluster import Cluster
    from hubert_ray.config.loading import load_recipe
    from hubert_ray.distributed.cluster import connected
    from hubert_ray.storage.filesystem import Storage

    storage = Storage(str(tmp_path_factory.mktemp("storage")))
    recipe = load_recipe(str(SMOKE), [])
    for _ in pipeline.run(recipe, storage, Cluster(), connected(Cluster()), "prepare_data"):
        pass
    return storage, f"corpora/{recipe.corpus.name}"
