"""Centroids are bit-equal for any number of holders, and when one is killed in the middle of a fit."""

from __future__ import annotations

import itertools
import zlib

import numpy as np
import pytest
import ray

from hubert_ray.config.cluster import Cluster
from hubert_ray.config.recipe import Kmeans
from hubert_ray.distributed.kmeans_reduce import LANES, FeatureSample, lane_of, subtrees, tree_sum
from hubert_ray.errors import TrainingError
from hubert_ray.units import kmeans
from hubert_ray.units.kmeans import Fit, Partial

pytestmark = pytest.mark.slow
SHARDS = [f"train-{number:05d}" for number in range(150)]  # more than lanes: some have two blocks, some three
CLUSTERS, PASSES = 12, 6


class Blocks:
    """A made-up teacher: blocks of unequal size, one of them empty."""

    def __call__(self, shard):
        if shard == SHARDS[3]:
            return np.empty((0, 5), dtype=np.float32)
        rng = np.random.default_rng(zlib.crc32(shard.encode()))
        return (rng.normal(size=(rng.integers(20, 90), 5)) * 3 + rng.integers(-5, 5, 5)).astype(np.float32)


def fit(workers: int, kill_at: int | None = None, max_failures: int = 3):
    cluster = Cluster(kmeans_workers=workers, max_failures=max_failures)
    with FeatureSample(Blocks, SHARDS, cluster) as sample:
        held = [len(ray.get(holder.positions.remote())) for holder in sample._holders]
        assert sum(held) == len(SHARDS)
        assert max(held) - min(held) <= len(SHARDS) / LANES + 1, "the holders' shares are uneven"
        rng = np.random.default_rng(0)
        centroids = kmeans.seed(sample.draw(500, rng), CLUSTERS, 2, rng)
        for number in range(PASSES):
            if number == kill_at:
                victim = sample._holders[-1]
                assert ray.get(victim.positions.remote()), "nothing would be lost"
                ray.kill(victim)
            (total,) = sample.reduce([(centroids, 1)])
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


def test_restarts_side_by_side_are_those_made_alone(ray_local):
    settings = Kmeans(clusters=CLUSTERS)
    with FeatureSample(Blocks, SHARDS, Cluster(kmeans_workers=3)) as sample:
        starts = [
            Fit(kmeans.seed(sample.draw(500, np.random.default_rng(r)), CLUSTERS, 1, np.random.default_rng(r)))
            for r in range(3)
        ]

        def finish(fits):
            while not all(fit.done for fit in fits):
                fits = sample.lloyd_pass(fits, settings)
            return fits

        together, apart = finish(starts), [finish([start])[0] for start in starts]
    assert len({fit.inertia_history[-1] for fit in together}) > 1, "the starts must lead to different places"
    for one, other in zip(together, apart, strict=True):
        assert one.centroids_KD.tobytes() == other.centroids_KD.tobytes()
        assert one.inertia_history == other.inertia_history


@pytest.mark.parametrize("holders", [1, 2, 3, 5, 7, 64])
def test_subtrees_cover_every_lane_once_and_are_few(holders):
    bounds = [holder * LANES // holders for holder in range(holders + 1)]
    trees = [tree for start, stop in itertools.pairwise(bounds) for tree in subtrees(range(start, stop))]
    lanes = [lane for start, size in trees for lane in range(start, start + size)]
    assert lanes == list(range(LANES))
    assert all(start % size == 0 and size.bit_count() == 1 for start, size in trees)
    assert len(trees) <= (holders if holders.bit_count() == 1 else 6 * holders)


@pytest.mark.parametrize(("shards", "holders"), [(7, 2), (7, 5), (16, 4), (8, 8), (96, 8), (1000, 3)])
def test_few_shards_are_shared_out_too(shards, holders):
    bounds = [holder * LANES // holders for holder in range(holders + 1)]
    lanes = [lane_of(position, shards) for position in range(shards)]
    assert lanes == sorted(lanes)
    assert lanes[-1] < LANES
    held = [sum(start <= lane < stop for lane in lanes) for start, stop in itertools.pairwise(bounds)]
    assert max(held) - min(held) <= 1 + shards / LANES


def random_sums(lane: int) -> list[Partial] | None:
    rng = np.random.default_rng(lane)
    return (
        None
        if lane % 7 == 3
        else [Partial(rng.normal(size=(3, 2)) * 10.0 ** rng.integers(-8, 8), rng.integers(0, 9, 3), rng.normal())]
    )


@pytest.mark.parametrize("holders", [2, 3, 5, 7, 31, 64])
def test_a_tree_cut_anywhere_has_the_same_bits(holders):
    leaves = {(lane, 1): random_sums(lane) for lane in range(LANES) if random_sums(lane)}
    whole = tree_sum((0, LANES), leaves)
    bounds = [holder * LANES // holders for holder in range(holders + 1)]
    trees = [tree for start, stop in itertools.pairwise(bounds) for tree in subtrees(range(start, stop))]
    (cut,) = tree_sum((0, LANES), {tree: tree_sum(tree, leaves) for tree in trees})
    assert cut.sums_KD.tobytes() == whole[0].sums_KD.tobytes()
    assert (cut.inertia, cut.counts_K.tolist()) == (whole[0].inertia, whole[0].counts_K.tolist())
    straight = sum(part[0].inertia for part in leaves.values())
    assert straight == pytest.approx(whole[0].inertia)
    assert straight != whole[0].inertia, "numbers whose sum depends on the order, or the test shows nothing"


def test_too_many_lost_holders_stop_the_fit(ray_local):
    with pytest.raises(TrainingError, match="max_failures = 0"):
        fit(2, kill_at=1, max_failures=0)
