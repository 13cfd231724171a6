"""units/: k-means pieces and the quality measures against slow definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hubert_ray.config.recipe import Kmeans
from hubert_ray.errors import RecipeError
from hubert_ray.units import kmeans


def blobs(count=3000, dim=7, clusters=6, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dim)) * 10
    return (centres[rng.integers(clusters, size=count)] + rng.normal(size=(count, dim))).astype(np.float32)


def lloyd(frames, centroids, passes):
    for _ in range(passes):
        centroids = kmeans.update(kmeans.partial(frames, centroids), centroids)
    return centroids


def test_assign_is_the_nearest_centroid():
    frames, centroids = blobs(), blobs(count=20, seed=1)
    labels, distances = kmeans.assign(frames, centroids)
    slow = ((frames[:, None].astype(np.float64) - centroids[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(labels, slow.argmin(1))
    np.testing.assert_allclose(distances, slow.min(1), rtol=1e-3, atol=1e-2)


def test_partial_sums_per_cluster():
    frames, centroids = blobs(), blobs(count=9, seed=1)
    part = kmeans.partial(frames, centroids)
    labels, distances = kmeans.assign(frames, centroids)
    for cluster in range(9):
        np.testing.assert_allclose(
            part.sums_KD[cluster], frames[labels == cluster].sum(0, dtype=np.float64), rtol=1e-6, atol=1e-3
        )
        assert part.counts_K[cluster] == (labels == cluster).sum()
    assert part.inertia == pytest.approx(distances.sum(dtype=np.float64))


def test_partials_of_blocks_add_up():
    frames, centroids = blobs(), blobs(count=9, seed=1)
    whole = kmeans.partial(frames, centroids)
    split = kmeans.partial(frames[:1000], centroids) + kmeans.partial(frames[1000:], centroids)
    np.testing.assert_allclose(split.sums_KD, whole.sums_KD, rtol=1e-12)
    np.testing.assert_array_equal(split.counts_K, whole.counts_K)


def test_empty_block_is_nothing():
    part = kmeans.partial(np.empty((0, 7), dtype=np.float32), blobs(count=4))
    assert part.counts_K.sum() == 0
    assert not part.sums_KD.any()


def test_lloyd_never_raises_the_inertia_and_finds_blobs():
    frames = blobs()
    centroids = kmeans.seed(frames, None, 6, np.random.default_rng(0))[0]
    history = []
    for _ in range(10):
        part = kmeans.partial(frames, centroids)
        history.append(part.inertia)
        centroids = kmeans.update(part, centroids)
    assert all(b <= a * (1 + 1e-6) for a, b in zip(history, history[1:], strict=False))
    assert history[-1] / len(frames) == pytest.approx(7, rel=0.1)  # unit variance in 7 dimensions


def test_empty_clusters_are_filled():
    frames = blobs()
    far = np.full((2, 7), 1e4, dtype=np.float32)
    start = np.concatenate([blobs(count=4, seed=3), far])
    assert (kmeans.partial(frames, start).counts_K[-2:] == 0).all()
    assert (kmeans.partial(frames, lloyd(frames, start, 3)).counts_K > 0).all()


def test_seeding_beats_random_rows_and_needs_enough_frames():
    frames = blobs(clusters=30)
    rng = np.random.default_rng(0)
    seeded = kmeans.partial(frames, kmeans.seed(frames, None, 30, rng)[0]).inertia
    randoms = [kmeans.partial(frames, frames[rng.choice(len(frames), 30, replace=False)]).inertia for _ in range(5)]
    assert seeded < min(randoms)
    with pytest.raises(ValueError, match="3 frames cannot seed 5"):
        kmeans.seed(frames[:3], None, 5, rng)


def test_seeding_finds_the_clusters_of_wide_features():
    """Which it sees through a random projection only; the centroids are frames as they are."""
    frames = blobs(count=2000, dim=700, clusters=20)
    centroids, inertia = kmeans.seed(frames, None, 20, np.random.default_rng(0))
    assert {row.tobytes() for row in centroids} <= {row.tobytes() for row in frames}
    assert inertia == pytest.approx(kmeans.partial(frames, centroids).inertia)
    assert inertia / len(frames) < 2 * 700 * 1.05  # each cluster has a frame: twice the variance of one


def test_half_precision_frames_are_summed_in_full():
    frames, centroids = blobs(count=40_000), blobs(count=9, seed=1)  # more than are widened at a time
    half = frames.astype(np.float16)
    part, wide = kmeans.partial(half, centroids), kmeans.partial(half.astype(np.float32), centroids)
    assert part.sums_KD.dtype == np.float64
    np.testing.assert_array_equal(part.sums_KD, wide.sums_KD)
    np.testing.assert_array_equal(part.counts_K, wide.counts_K)


def test_short_and_long_blocks_are_assigned_alike():
    """faiss takes another way below a number of frames; labels must not depend on how long an utterance is."""
    frames, centroids = blobs(count=20_000, dim=39), blobs(count=100, dim=39, seed=1)
    whole = kmeans.assign(frames, centroids)[0]
    pieces = np.concatenate([kmeans.assign(frames[i : i + 50], centroids)[0] for i in range(0, len(frames), 50)])
    assert (whole == pieces).all()


def fitted(frames, start, **settings):
    """Passes as the distributed fit makes them, and the stride of each."""
    fit, strides = kmeans.Fit(start, kmeans.first_stride(len(frames), len(start))), []
    while not fit.done:
        strides.append(fit.stride)
        fit = fit.advance(
            kmeans.partial(fit.frames(frames, 0), fit.centroids_KD), Kmeans(clusters=len(start), **settings)
        )
    return fit, strides


def test_a_fit_grows_to_all_frames_and_ends_settled():
    frames = blobs(count=90_000, clusters=30)
    start = kmeans.seed(frames[::90], None, 20, np.random.default_rng(0))[0]
    fit, strides = fitted(frames, start)
    assert sorted(set(strides)) == [1, 4, 16]
    assert strides == sorted(strides, reverse=True)
    history = fit.inertia_history
    assert len(history) == strides.count(1) >= 2
    assert history[-2] - history[-1] < 2e-4 * history[-2]
    last = kmeans.partial(frames, fit.centroids_KD)
    assert last.inertia / len(frames) == pytest.approx(history[-1])  # the centroids that the last inertia belongs to
    assert np.abs(kmeans.update(last, fit.centroids_KD) - fit.centroids_KD).max() < 0.2


def test_a_fit_ends_when_its_passes_are_used_up():
    frames = blobs(count=5000, clusters=30)
    start = kmeans.seed(frames[::10], None, 20, np.random.default_rng(0))[0]
    fit, strides = fitted(frames, start, tolerance=0.0, max_iterations=3)
    assert strides.count(1) <= 4
    assert len(fit.inertia_history) <= 4


@pytest.mark.parametrize("frames_a_cluster", [4, 30, 300, 1500])
def test_growing_costs_no_quality(frames_a_cluster):
    frames = blobs(count=40 * frames_a_cluster, clusters=60)
    start = kmeans.seed(frames[: max(60, len(frames) // 40)], None, 40, np.random.default_rng(0))[0]
    grown = fitted(frames, start)[0].inertia_history[-1]
    direct = kmeans.partial(frames, lloyd(frames, start, 60)).inertia / len(frames)
    assert grown < 1.02 * direct


def test_mini_batches_end_near_lloyd_and_settled():
    frames = blobs(count=50_000, clusters=30)
    start = kmeans.seed(frames[::50], None, 20, np.random.default_rng(0))[0]
    settings = Kmeans(clusters=20, algorithm="mini_batch")
    fit = kmeans.MiniBatchFit(start, kmeans.batch_stride(len(frames)), seed=3)
    batches = []
    while not fit.done:
        chosen = fit.frames(frames, 0)
        batches.append(chosen)
        fit = fit.advance(kmeans.partial(chosen, fit.centroids_KD), settings)
    assert len(batches) % 100 == 1, "windows of 100 batches, and a pass over all frames"
    assert [len(chosen) for chosen in batches] == [10_000] * (len(batches) - 1) + [50_000]
    assert len({chosen.tobytes() for chosen in batches}) == len(batches)
    last = kmeans.partial(frames, fit.centroids_KD)
    assert fit.inertia_history == (last.inertia / len(frames),)
    assert last.inertia < 1.02 * kmeans.partial(frames, lloyd(frames, start, 60)).inertia


def test_a_mini_batch_depends_on_its_number_and_the_block_alone():
    frames = blobs(count=1003)
    fit = kmeans.MiniBatchFit(frames[:4], 10, seed=1)
    again = kmeans.MiniBatchFit(frames[100:104], 10, seed=1)
    assert np.array_equal(fit.frames(frames, 5), again.frames(frames, 5))
    draws = [fit.frames(frames, position) for position in range(400)]
    assert {len(rows) for rows in draws} == {100, 101}
    assert np.mean([len(rows) for rows in draws]) == pytest.approx(100.3, abs=0.1)
    assert len(fit.frames(frames[:0], 5)) == 0


def test_a_centroid_of_mini_batches_is_the_mean_of_all_frames_it_ever_had():
    frames, settings = blobs(count=30_000), Kmeans(clusters=4, algorithm="mini_batch")
    fit = kmeans.MiniBatchFit(frames[:4], kmeans.batch_stride(len(frames)), seed=1)
    sums, counts = np.zeros((4, 7)), np.zeros(4)
    for _ in range(5):
        part = kmeans.partial(fit.frames(frames, 0), fit.centroids_KD)
        sums, counts = sums + part.sums_KD, counts + part.counts_K
        fit = fit.advance(part, settings)
        np.testing.assert_allclose(fit.centroids_KD, sums / counts[:, None], rtol=1e-6)


def test_seeding_minds_weights():
    """0 and 1 stand for 300 frames each, the two at 10 for one each: greedy draws prefer 0 and 1, the best of several even more."""
    frames, weights = np.array([[0], [1], [10], [10]], dtype=np.float32), np.array([300, 300, 1, 1])

    def seeds(draws, seed):
        return [kmeans.seed(frames, weights, 2, rng) for rng in np.random.default_rng(seed).spawn(draws)]

    def found(draws):
        return [set(kmeans.best(seeds(draws, seed))[:, 0]) for seed in range(200)]

    assert 65 < sum(centroids == {0, 1} for centroids in found(1)) < 110  # half begin with a 10
    assert sum(centroids == {0, 1} for centroids in found(9)) > 190
    same = [kmeans.seed(blobs(), w, 5, np.random.default_rng(0)) for w in (None, np.ones(3000))]
    assert same[0][0].tobytes() == same[1][0].tobytes()
    assert same[0][1] == pytest.approx(kmeans.partial(blobs(), same[0][0]).inertia)


def test_a_codebook_of_several_streams_is_several_codebooks():
    frames, wide, narrow = blobs(dim=12), blobs(count=9, dim=12, seed=1), blobs(count=9, dim=4, seed=2)
    ensemble = kmeans.Codebook(wide, (2, 7)).labels(frames)
    assert ensemble.dtype == np.uint16
    assert np.array_equal(ensemble[:, 0], kmeans.assign(frames, wide[:2])[0])
    assert np.array_equal(ensemble[:, 1], kmeans.assign(frames, wide[2:])[0])
    product = kmeans.Codebook(narrow, (3, 2, 4)).labels(frames)
    for stream, (rows, dims) in enumerate([((0, 3), (0, 4)), ((3, 5), (4, 8)), ((5, 9), (8, 12))]):
        assert np.array_equal(product[:, stream], kmeans.assign(frames[:, slice(*dims)], narrow[slice(*rows)])[0])
    assert np.array_equal(kmeans.Codebook(wide, (9,)).labels(frames)[:, 0], kmeans.assign(frames, wide)[0])
    with pytest.raises(RecipeError, match="13 features cannot be shared out evenly among 3 streams"):
        kmeans.part_of(13, 0, 3)


def test_assignment_by_torch_is_that_by_faiss():
    frames, centroids = (
        blobs(count=70_000, dim=39),
        blobs(count=50, dim=39, seed=1),
    )  # more rows than are taken at a time
    ours, theirs = kmeans.assign_by_torch(frames, centroids, torch.device("cpu")), kmeans.assign(frames, centroids)
    assert (ours[0] != theirs[0]).mean() < 1e-4
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-3, atol=1e-2)
    assert (ours[0].dtype, ours[1].dtype) == (theirs[0].dtype, theirs[1].dtype)
    assert [len(part) for part in kmeans.assign_by_torch(frames[:0], centroids, torch.device("cpu"))] == [0, 0]


def test_a_fit_in_one_process_is_that_of_the_growing_passes():
    frames = blobs(count=3000, clusters=20)
    chosen = Kmeans(clusters=20, seed=5)
    found = kmeans.fit(frames, 20, chosen)
    assert found.done
    rng = np.random.default_rng(5)
    rows = np.sort(rng.choice(3000, size=20 * kmeans.SEEDING_FRAMES, replace=False))
    start = kmeans.best([kmeans.seed(frames[rows], None, 20, draw) for draw in rng.spawn(chosen.seedings)])
    np.testing.assert_array_equal(found.centroids_KD, fitted(frames, start)[0].centroids_KD)
    assert not np.array_equal(kmeans.fit(frames, 20, Kmeans(clusters=20, seed=6)).centroids_KD, found.centroids_KD)
