"""A lost worker, a user's error and the number of workers: none changes what shards yield."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from hubert_ray.config.cluster import Cluster
from hubert_ray.distributed.shard_map import shard_map
from hubert_ray.errors import CorpusError

pytestmark = pytest.mark.slow
SHARDS = [f"train-{number:05d}" for number in range(6)]


class Echo:
    """Leaves a mark per call; on one shard it dies or complains, once or always."""

    def __init__(self, folder: str, die_on: str = "", refuse: str = ""):
        self._folder, self._die_on, self._refuse = Path(folder), die_on, refuse

    def __call__(self, shard):
        mark = self._folder / f"{shard}.died"
        if shard == self._die_on and not mark.exists():
            mark.touch()
            os._exit(9)  # as a node that goes away does: no exception, no farewell
        if shard == self._refuse:
            raise CorpusError(f"{shard} is no good")
        return {"value": int(shard[-5:]) ** 2}


@pytest.mark.parametrize("workers", [1, 3])
def test_every_shard_once_for_any_number_of_workers(ray_local, tmp_path, workers):
    rows = list(shard_map(partial(Echo, str(tmp_path)), SHARDS, Cluster(data_workers=workers)))
    assert sorted((row["shard"], row["value"]) for row in rows) == [(s, n**2) for n, s in enumerate(SHARDS)]


def test_a_killed_worker_costs_nothing(ray_local, tmp_path):
    rows = list(shard_map(partial(Echo, str(tmp_path), die_on=SHARDS[2]), SHARDS, Cluster()))
    assert (tmp_path / f"{SHARDS[2]}.died").exists()
    assert sorted(row["shard"] for row in rows) == SHARDS


def test_a_users_error_arrives_as_itself(ray_local, tmp_path):
    with pytest.raises(CorpusError, match="train-00003 is no good"):
        list(shard_map(partial(Echo, str(tmp_path), refuse=SHARDS[3]), SHARDS, Cluster()))


def test_no_shards_no_ray():
    assert list(shard_map(Echo, [], Cluster())) == []
