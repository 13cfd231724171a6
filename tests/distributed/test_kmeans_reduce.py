"""Centroids are bit-equal for any number of holders, and when one is killed in the middle of a fit."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import ray

from hubert_ray.config.cluster import Cluster
from hubert_ray.distributed.kmeans_reduce import FeatureSample
from hubert_ray.errors import TrainingError
from hubert_ray.units import kmeans

pytestmark = pytest.mark.slow
SHARDS = [f"train-{number:05d}" for number in range(7)]
CLUSTERS, PASSES = 12, 6


class Blocks:
    """A made-up teacher: blocks of unequal size, one of them empty."""

    def __call__(self, shard):
        if shard == SHARDS[3]:
            return np.empty((0, 5), dtype=np.float32)
        rng = np.random.default_rng(zlib.crc32(shard.encode()))
        return (rng.normal(size=(rng.integers(200, 900), 5)) * 3 + rng.integers(-5, 5, 5)).astype(np.float32)


def fit(workers: int, kill_at: int | None = None, max_failures: int = 3):
    cluster = Cluster(kmeans_workers=workers, max_failures=max_failures)
    with FeatureSample(Blocks, SHARDS, cluster) as sample:
        rng = np.random.default_rng(0)
        centroids = kmeans.seed(sample.draw(500, rng), CLUSTERS, 2, rng)
        for number in range(PASSES):
            if number == kill_at:
                ray.kill(sample._holders[-1])
            total = sample.reduce(centroids)
            centroids = kmeans.update(total, centroids)
        return centroids, total.inertia, sample.frames


@pytest.fixture(scope="module")
def alone(ray_local):
    return fit(1)


def test_fit_equals_plain_lloyd_in_one_process(alone):
    blocks = [Blocks()(shard) for shard in SHARDS]
    frames = np.concatenate(blocks)
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(len(frames), 500, replace=False))
    centroids = kmeans.seed(frames[chosen], CLUSTERS, 2, rng)
    for _ in range(PASSES):
        centroids = kmeans.update(kmeans.partial(frames, centroids), centroids)
    assert alone[2] == len(frames)
    np.testing.assert_allclose(alone[0], centroids, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("workers", [2, 5])
def test_bits_do_not_depend_on_workers(alone, workers):
    centroids, inertia, frames = fit(workers)
    assert centroids.tobytes() == alone[0].tobytes()
    assert (inertia, frames) == alone[1:]


def test_bits_survive_a_killed_holder(alone):
    centroids, inertia, _ = fit(2, kill_at=3)
    assert centroids.tobytes() == alone[0].tobytes()
    assert inertia == alone[1]


def test_too_many_lost_holders_stop_the_fit(ray_local):
    with pytest.raises(TrainingError, match="max_failures = 0"):
        fit(2, kill_at=1, max_failures=0)
