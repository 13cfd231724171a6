"""How are clusters found? Seeding, assignment, partial sums and the update of Lloyd's algorithm, as pure functions.

Each takes and returns values, so the same code serves one process and many: the distributed fit (distributed/
kmeans_reduce.py) only decides who holds which frames and adds `Partial`s in a fixed order. Distances come from faiss on
one thread, sums are kept in float64, so a block of frames gives the same partial wherever it is computed.
Notation: N frames, D dimensions, K clusters. fairseq's counterpart: `examples/hubert/simple_kmeans/learn_kmeans.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np
import torch

from hubert_ray.config.recipe import Kmeans

faiss.cvar.distance_compute_blas_threshold = 1  # below it, 3,282 frames of MFCC, faiss is six times slower per frame
_ROWS_AT_ONCE = 16_384  # of a block: what is made of them on the way stays in the processor's cache


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
    """Assigns a block of frames and sums it up per cluster. float16 frames are widened a few at a time."""
    clusters, dim = centroids_KD.shape
    sums_KD = torch.zeros(clusters, dim, dtype=torch.float64)
    counts_K, inertia = np.zeros(clusters, dtype=np.int64), 0.0
    for start in range(0, len(frames_ND), _ROWS_AT_ONCE):
        rows_ND = np.ascontiguousarray(frames_ND[start : start + _ROWS_AT_ONCE], dtype=np.float32)
        labels_N, distances_N = assign(rows_ND, centroids_KD)
        sums_KD.index_add_(0, torch.from_numpy(labels_N), torch.from_numpy(rows_ND).double())  # row after row
        counts_K += np.bincount(labels_N, minlength=clusters)
        inertia += float(distances_N.sum(dtype=np.float64))
    return Partial(sums_KD.numpy(), counts_K, inertia)


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


@dataclass(frozen=True)
class Fit:
    """A codebook on its way through Lloyd's algorithm: what the next pass starts from, and what the passes so far found.

    Where there are enough frames (`first_stride`), the first passes go over every 16th, the next ones over every 4th, the last
    ones over all: an early pass need not be exact to be of use, and costs a fraction. Each phase ends when its inertia settles.
    Once the fit is done, `centroids_KD` are those that the last entry of the history belongs to.
    """

    centroids_KD: np.ndarray
    stride: int = 1  # of the frames that the next pass goes over
    inertia_history: tuple[float, ...] = ()  # mean squared distance, per pass of this stride
    empty: int = 0  # clusters without a frame in the last pass
    done: bool = False

    def advance(self, total: Partial, settings: Kmeans) -> Fit:
        """After a pass. The fit is done when the inertia over all frames settles with no cluster empty, or passes run out."""
        history = (*self.inertia_history, total.inertia / int(total.counts_K.sum()))
        empty = int((total.counts_K == 0).sum())
        settled = len(history) > 1 and history[-2] - history[-1] < settings.tolerance * history[-2]
        ends = len(history) > settings.max_iterations or (settled and not empty)
        if ends and self.stride == 1:
            return Fit(self.centroids_KD, 1, history, empty, done=True)
        stride, history = (self.stride // 4, ()) if ends else (self.stride, history)
        return Fit(update(total, self.centroids_KD), stride, history, empty)


def first_stride(frames: int, clusters: int) -> int:
    """The largest stride that leaves each cluster frames enough to stand for all of them; faiss's own bound for samples."""
    return next((stride for stride in (16, 4) if frames >= stride * 256 * clusters), 1)


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
