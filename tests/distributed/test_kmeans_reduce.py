"""Centroids are bit-equal for any number of holders, and when one is killed in the middle of a fit."""

from __future__ import annotations

import itertools
import zlib
from functools import partial as bind

import msgspec
import numpy as np
import pytest
import ray

from hubert_ray.config.cluster import Cluster
from hubert_ray.config.recipe import Kmeans
from hubert_ray.distributed import kmeans_reduce
from hubert_ray.distributed.kmeans_reduce import LANES, FeatureSample, lane_of, subtrees, tree_sum
from hubert_ray.errors import TrainingError
from hubert_ray.stages.learn_kmeans import first_fits
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
        centroids = kmeans.best(sample.seed(sample.draw(500, rng), CLUSTERS, rng.spawn(3)))
        for number in range(PASSES):
            if number == kill_at:
                victim = sample._holders[-1]
                assert ray.get(victim.positions.remote()), "nothing would be lost"
                ray.kill(victim)
            (total,) = sample.reduce([Fit(centroids)])
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
    centroids = kmeans.best([kmeans.seed(frames[chosen], None, CLUSTERS, draw) for draw in rng.spawn(3)])
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


FEW_SHARDS = SHARDS[3::4]  # with the one that has an empty block
SETTINGS = {
    "plain": Kmeans(clusters=12),
    "restarts": Kmeans(clusters=12, restarts=3),
    "ensemble": Kmeans(clusters=(5, 12)),
    "product": Kmeans(clusters=(5, 12), product=True),
    "mini-batch": Kmeans(clusters=12, algorithm="mini_batch", tolerance=0.5),
    "parallel": Kmeans(clusters=(5, 12), seeding="parallel"),
}


class Part:
    """Some of the features of the made-up teacher; an even number for two streams."""

    def __init__(self, first=0, beyond=4):
        self._dims = slice(first, beyond)

    def __call__(self, shard):
        return np.ascontiguousarray(Blocks()(shard)[:, self._dims])


def finish(sample, settings):
    """The fits of a whole k-means as learn_kmeans makes it."""
    fits = first_fits(sample, settings)
    while not all(fit.done for fit in fits):
        fits = sample.one_pass(fits, settings)
    return fits


def bits(fits):
    return [(fit.stream, fit.restart, fit.centroids_KD.tobytes(), fit.inertia_history) for fit in fits]


@pytest.fixture(scope="module")
def by_one_holder(ray_local):
    with FeatureSample(Part, FEW_SHARDS, Cluster(kmeans_workers=1)) as sample:
        return {name: finish(sample, settings) for name, settings in SETTINGS.items()}


def test_whole_fits_have_the_same_bits_for_more_holders(by_one_holder):
    with FeatureSample(Part, FEW_SHARDS, Cluster(kmeans_workers=3)) as sample:
        for name, settings in SETTINGS.items():
            assert bits(finish(sample, settings)) == bits(by_one_holder[name]), name


def test_restarts_side_by_side_are_those_made_alone(by_one_holder):
    together = by_one_holder["restarts"]
    assert len({fit.inertia_history[-1] for fit in together}) > 1, "the starts must lead to different places"
    with FeatureSample(Part, FEW_SHARDS, Cluster(kmeans_workers=2)) as sample:
        for start, one in zip(first_fits(sample, SETTINGS["restarts"]), together, strict=True):
            fits = [start]
            while not fits[0].done:
                fits = sample.one_pass(fits, SETTINGS["restarts"])
            assert bits(fits) == bits([one])


@pytest.mark.parametrize("name", ["ensemble", "parallel"])
def test_a_stream_of_an_ensemble_is_the_codebook_fitted_alone(by_one_holder, name):
    with FeatureSample(Part, FEW_SHARDS, Cluster(kmeans_workers=2)) as sample:
        for fit, clusters in zip(by_one_holder[name], (5, 12), strict=True):
            (alone,) = finish(sample, msgspec.structs.replace(SETTINGS[name], clusters=clusters))
            assert fit.centroids_KD.shape == (clusters, 4)
            assert bits([fit])[0][2:] == bits([alone])[0][2:]


def test_a_stream_of_a_product_is_the_codebook_of_its_features_alone(by_one_holder):
    for fit, clusters in zip(by_one_holder["product"], (5, 12), strict=True):
        with FeatureSample(bind(Part, *fit.dims), FEW_SHARDS, Cluster(kmeans_workers=2)) as sample:
            (alone,) = finish(sample, Kmeans(clusters=clusters))
        assert fit.centroids_KD.shape == (clusters, 2)
        assert bits([fit])[0][2:] == bits([alone])[0][2:]


def test_mini_batches_and_parallel_seeding_end_near_lloyd(by_one_holder):
    plain, batches = by_one_holder["plain"][0], by_one_holder["mini-batch"][0]
    parallel = by_one_holder["parallel"][1]
    assert len(batches.inertia_history) == 1
    assert batches.centroids_KD.tobytes() != plain.centroids_KD.tobytes() != parallel.centroids_KD.tobytes()
    assert batches.inertia_history[-1] < 1.05 * plain.inertia_history[-1]
    assert parallel.inertia_history[-1] < 1.05 * plain.inertia_history[-1]


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


def test_a_holder_that_is_killed_for_its_memory_is_replaced(ray_local):
    """Ray raises something else for it than for an actor that died otherwise."""

    @ray.remote
    def killed():
        raise ray.exceptions.OutOfMemoryError("the node ran out of memory")

    with FeatureSample(Blocks, SHARDS, Cluster(kmeans_workers=2)) as sample:
        victim = sample._holders[0]
        answers = sample._ask(lambda holder: (killed if holder is victim else holder.positions).remote())
        assert sorted(answers[0] + answers[1]) == list(range(len(SHARDS)))
        assert sample._holders[0] is not victim


def test_blocks_larger_than_a_slice_arrive_whole(ray_local, monkeypatch):
    monkeypatch.setattr(
        kmeans_reduce, "_SLICE", 16 * 5 * 4
    )  # 16 frames; read by the extraction workers, so called here
    with FeatureSample(Blocks, SHARDS, Cluster(kmeans_workers=1)) as sample:
        (holder,) = sample._holders
        extract = kmeans_reduce._Extract(Blocks, {SHARDS[0]: (0, holder), SHARDS[3]: (3, holder)})
        assert extract(SHARDS[0]) == {"position": 0, "frames": len(Blocks()(SHARDS[0]))}
        assert extract(SHARDS[3]) == {"position": 3, "frames": 0}
        rows = ray.get(holder.rows.remote({0: np.arange(len(Blocks()(SHARDS[0]))), 3: np.arange(0)}))
        np.testing.assert_array_equal(rows[0], Blocks()(SHARDS[0]))
        assert rows[3].shape == (0, 5)
