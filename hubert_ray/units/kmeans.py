"""How are clusters found? Seeding, assignment, partial sums and the update of Lloyd's algorithm, as pure functions.

Each takes and returns arrays, so the same code serves one process and many: the distributed fit (distributed/
kmeans_reduce.py) only decides who holds which frames and adds `Partial`s in a fixed order. Distances come from faiss on
one thread, sums are kept in float64, so a block of frames gives the same partial wherever it is computed.
Notation: N frames, D dimensions, K clusters. fairseq's counterpart: `examples/hubert/simple_kmeans/learn_kmeans.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np


@dataclass(frozen=True)
class Partial:
    """What one block of frames contributes to an update. Adding two is exact up to float64 rounding."""

    sums_KD: np.ndarray  # float64
    counts_K: np.ndarray  # int64
    inertia: float  # sum of squared distances to the nearest centroid

    def __add__(self, other: Partial) -> Partial:
        return Partial(
            self.sums_KD + other.sums_KD, self.counts_K + other.counts_K, self.inertia + other.inertia
        )  # not in place: a Partial may be shared


def assign(frames_ND: np.ndarray, centroids_KD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(nearest centroid (N,) int64, squared Euclidean distance to it (N,) float32)."""
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatL2(centroids_KD.shape[1])
    index.add(np.ascontiguousarray(centroids_KD, dtype=np.float32))
    distances_N1, labels_N1 = index.search(np.ascontiguousarray(frames_ND, dtype=np.float32), 1)
    return labels_N1[:, 0], np.maximum(distances_N1[:, 0], 0)


def partial(frames_ND: np.ndarray, centroids_KD: np.ndarray) -> Partial:
    """Assigns a block of frames and sums it up per cluster."""
    clusters, dim = centroids_KD.shape
    labels_N, distances_N = assign(frames_ND, centroids_KD)
    counts_K = np.bincount(labels_N, minlength=clusters)
    sums_KD = np.zeros((clusters, dim))
    order_N = np.argsort(labels_N.astype(np.uint16), kind="stable")  # 16 bits: numpy sorts these by radix
    used = np.flatnonzero(counts_K)
    starts = (np.cumsum(counts_K) - counts_K)[used]
    if len(used):
        sums_KD[used] = np.add.reduceat(frames_ND[order_N], starts, axis=0, dtype=np.float64)
    return Partial(sums_KD, counts_K, float(distances_N.sum(dtype=np.float64)))


def update(total: Partial, centroids_KD: np.ndarray) -> np.ndarray:
    """The next centroids, (K, D) float32. A cluster that got no frame takes half of the largest one's.

    The half is made as faiss does it: both centroids stand at the large cluster's mean, moved apart by a factor of
    1 +- 1/1024 in alternating dimensions; the next pass parts the frames between them.
    """
    counts_K = total.counts_K.copy()
    means_KD = total.sums_KD / np.maximum(counts_K, 1)[:, None]
    sign_D = np.where(np.arange(centroids_KD.shape[1]) % 2 == 0, 1.0, -1.0) / 1024
    for empty in np.flatnonzero(counts_K == 0):
        large = int(counts_K.argmax())
        means_KD[empty] = means_KD[large] * (1 + sign_D)
        means_KD[large] = means_KD[large] * (1 - sign_D)
        counts_K[empty] = counts_K[large] // 2
        counts_K[large] -= counts_K[empty]
    return means_KD.astype(np.float32)


def seed(frames_ND: np.ndarray, clusters: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Starting centroids by greedy k-means++, the best of `draws` by inertia on `frames_ND`; (K, D) float32.

    Raises ValueError where there are fewer frames than clusters.
    """
    if len(frames_ND) < clusters:
        raise ValueError(f"{len(frames_ND)} frames cannot seed {clusters} clusters")
    frames_ND = np.ascontiguousarray(frames_ND, dtype=np.float32)
    candidates = [_plus_plus(frames_ND, clusters, rng) for _ in range(draws)]
    return min(candidates, key=lambda centroids: float(assign(frames_ND, centroids)[1].sum(dtype=np.float64)))


def _plus_plus(frames_ND: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """One k-means++ draw; of 2 + ln K candidates per centroid the one that lowers the inertia most is taken."""
    trials = 2 + int(np.log(clusters))
    squares_N = np.einsum("nd,nd->n", frames_ND, frames_ND)
    chosen = [int(rng.integers(len(frames_ND)))]
    nearest_N = _squared_distances(frames_ND, squares_N, chosen)[0]
    for _ in range(clusters - 1):
        cumulative = np.cumsum(nearest_N, dtype=np.float64)
        draws = np.searchsorted(cumulative, rng.random(trials) * cumulative[-1]).clip(max=len(frames_ND) - 1)
        distances_CN = np.minimum(_squared_distances(frames_ND, squares_N, draws), nearest_N)
        best = int(distances_CN.sum(axis=1, dtype=np.float64).argmin())
        chosen.append(int(draws[best]))
        nearest_N = distances_CN[best]
    return frames_ND[chosen].copy()


def _squared_distances(frames_ND: np.ndarray, squares_N: np.ndarray, rows: np.ndarray | list[int]) -> np.ndarray:
    """Squared distances of all frames from the frames in `rows`, (C, N)."""
    cross_CN = frames_ND[rows] @ frames_ND.T
    return np.maximum(squares_N[rows][:, None] - 2 * cross_CN + squares_N[None], 0)
