"""How are clusters found? Seeding, assignment, partial sums and the update of Lloyd's algorithm, as pure functions.

Each takes and returns values, so the same code serves one process and many: the distributed fit (distributed/
kmeans_reduce.py) only decides who holds which frames and adds `Partial`s in a fixed order. Distances come from faiss on
one thread, sums are kept in float64, so a block of frames gives the same partial wherever it is computed.

A `Codebook` has one label stream or several (HuBERT (Hsu et al. 2021) II-C, V-E). Streams are fitted apart, each with the seed of
the recipe, so a stream is, bit for bit, the codebook that is fitted alone; they only share the way over the frames.
Notation: N frames, D dimensions, K clusters, S label streams. fairseq: `examples/hubert/simple_kmeans/learn_kmeans.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import faiss
import numpy as np
import torch

from hubert_ray.config.recipe import Kmeans
from hubert_ray.errors import RecipeError

faiss.cvar.distance_compute_blas_threshold = 1  # below it, 3,282 frames of MFCC, faiss is six times slower per frame
SEEDING_FRAMES = 100  # per cluster; with fewer k-means++ goes for outliers, more only take longer
# Seeding looks at wider features in so many random directions, which keeps distances within a tenth or so (Boutsidis et al. 2010)
# and takes a fifth of the time at 768 numbers. On 780 numbers of real speech, 20 MFCC frames side by side, inertia after six
# passes was the same within 0.1 %; on 2,000 made-up Gaussians in 768 dimensions it was 1 % higher.
_SEEDING_DIMS = 128
_BATCH_FRAMES, _WINDOW = 10_000, 100  # of mini-batches: fairseq's batch_size and max_no_improvement
_CPU = torch.device("cpu")
_ROWS_ON_GPU = 65_536  # whose distances from all centroids are there at a time
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


def assign(
    frames_ND: np.ndarray, centroids_KD: np.ndarray, device: torch.device = _CPU
) -> tuple[np.ndarray, np.ndarray]:
    """(nearest centroid (N,) int64, squared Euclidean distance to it (N,) float32).

    On a GPU by torch, elsewhere by faiss. The two may differ where a frame is as near to one centroid as to another up to rounding,
    hence the caller says which, the same for all frames of a fit.
    """
    if device.type != "cpu":
        return assign_by_torch(frames_ND, centroids_KD, device)
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatL2(centroids_KD.shape[1])
    index.add(np.ascontiguousarray(centroids_KD, dtype=np.float32))
    distances_N1, labels_N1 = index.search(np.ascontiguousarray(frames_ND, dtype=np.float32), 1)
    return labels_N1[:, 0], np.maximum(distances_N1[:, 0], 0)


def assign_by_torch(
    frames_ND: np.ndarray, centroids_KD: np.ndarray, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """`assign` in float32 by matrix products on any device. Tested on the CPU; no GPU has run it yet (tests/gpu does)."""
    table_KD, labels, distances = torch.from_numpy(centroids_KD).float().to(device), [], []
    half_squares_K = table_KD.square().sum(1) / 2
    for start in range(0, len(frames_ND), _ROWS_ON_GPU):
        rows_ND = torch.from_numpy(frames_ND[start : start + _ROWS_ON_GPU].astype(np.float32)).to(device)
        halves_NK = torch.addmm(half_squares_K, rows_ND, table_KD.T, alpha=-1)  # of the distances, less ||x||^2 / 2
        labels_N = halves_NK.argmin(1)
        labels.append(labels_N.cpu())
        distances.append((rows_ND - table_KD[labels_N]).square().sum(1).cpu())
    if not labels:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    return torch.cat(labels).numpy(), torch.cat(distances).numpy()


@dataclass(frozen=True)
class Codebook:
    """The centroids of one label stream or of several, as `centroids.npy` holds them: those of one stream under those of another.

    Centroids as wide as the features see all of them; narrower ones see their stream's even part (`part_of`).
    """

    centroids_RD: np.ndarray  # R = sum of the classes
    classes: tuple[int, ...]  # clusters of each stream

    def labels(self, frames_ND: np.ndarray, device: torch.device = _CPU) -> np.ndarray:
        """The nearest centroid of each frame in each stream, (N, S) uint16, counted from 0 in every stream."""
        streams, width = len(self.classes), frames_ND.shape[1]
        product = self.centroids_RD.shape[1] < width
        labels_NS = np.empty((len(frames_ND), streams), dtype=np.uint16)
        for stream, centroids_KD in enumerate(np.split(self.centroids_RD, np.cumsum(self.classes)[:-1])):
            first, beyond = part_of(width, stream, streams) if product else (0, width)
            labels_NS[:, stream] = assign(frames_ND[:, first:beyond], centroids_KD, device)[0]
        return labels_NS


def part_of(dim: int, stream: int, streams: int) -> tuple[int, int]:
    """The features of a stream of a product codebook, (first, one beyond the last): an even part, in order."""
    if dim % streams:
        raise RecipeError(f"kmeans.product: {dim} features cannot be shared out evenly among {streams} streams")
    return stream * dim // streams, (stream + 1) * dim // streams


def partial(frames_ND: np.ndarray, centroids_KD: np.ndarray, device: torch.device = _CPU) -> Partial:
    """Assigns a block of frames, on `device`, and sums it up per cluster, in order. float16 frames are widened a few at a time."""
    clusters, dim = centroids_KD.shape
    sums_KD = torch.zeros(clusters, dim, dtype=torch.float64)
    counts_K, inertia = np.zeros(clusters, dtype=np.int64), 0.0
    for start in range(0, len(frames_ND), _ROWS_AT_ONCE):
        rows_ND = np.ascontiguousarray(frames_ND[start : start + _ROWS_AT_ONCE], dtype=np.float32)
        labels_N, distances_N = assign(rows_ND, centroids_KD, device)
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
    stream: int = 0  # the label stream that this codebook is for
    restart: int = 0  # number of this try at it
    dims: tuple[int, int | None] = (0, None)  # the features that it sees, (first, one beyond the last)
    inertia_history: tuple[float, ...] = ()  # mean squared distance, per pass of this stride
    empty: int = 0  # clusters without a frame in the last pass
    done: bool = False

    def frames(self, block_ND: np.ndarray, position: int) -> np.ndarray:
        """What the next pass sees of the block at this position among all blocks."""
        return block_ND[:: self.stride, slice(*self.dims)]

    def progress(self) -> str:
        """How far it is, for a reader."""
        frames = "all frames" if self.stride == 1 else f"1/{self.stride} of the frames"
        return f"pass {len(self.inertia_history):>3} over {frames}"

    def advance(self, total: Partial, settings: Kmeans) -> Fit:
        """After a pass. The fit is done when the inertia over all frames settles with no cluster empty, or passes run out."""
        history = (*self.inertia_history, total.inertia / int(total.counts_K.sum()))
        empty = int((total.counts_K == 0).sum())
        settled = len(history) > 1 and history[-2] - history[-1] < settings.tolerance * history[-2]
        ends = len(history) > settings.max_iterations or (settled and not empty) or settings.algorithm == "mini_batch"
        if ends and self.stride == 1:
            return replace(self, inertia_history=history, empty=empty, done=True)
        stride, history = (self.stride // 4, ()) if ends else (self.stride, history)
        centroids_KD = update(total, self.centroids_KD)
        return replace(self, centroids_KD=centroids_KD, stride=stride, inertia_history=history, empty=empty)


@dataclass(frozen=True)
class MiniBatchFit(Fit):
    """A codebook on its way through mini-batches (Sculley 2010), drawn by seed with replacement from all frames: a centroid is the
    mean of the frames that were ever assigned to it. When the mean inertia of `_WINDOW` batches is no lower than that of as many
    before, an ordinary `Fit` makes one pass over all frames, to say what the inertia is.

    Not the default, since it does not pay where the frames are in memory anyway: on 732,995 frames of MFCC, 100 clusters, three
    seeds with either seeding, it ended at an inertia of 1364 to 1370 after 300 to 500 batches, Lloyd's growing passes at 1349 to
    1352 in less time. A batch has a hundred frames of each block, and costs more in calls than in distances.

    `stride` is how many times a batch goes into all frames; `inertia_history` has an entry per window.
    """

    seed: int = 0
    batches: int = 0  # so far
    seen: Partial | None = None  # the sum of all batches
    window: float = 0.0  # mean squared distances of the batches since the last entry of the history, added up

    def frames(self, block_ND: np.ndarray, position: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, self.batches, position])
        count = (len(block_ND) + int(rng.integers(self.stride))) // self.stride  # rounded up as often as is fair
        rows_N = np.sort(rng.integers(max(1, len(block_ND)), size=count))
        return block_ND[rows_N, slice(*self.dims)]

    def progress(self) -> str:
        return f"{self.batches} mini-batches"

    def advance(self, total: Partial, settings: Kmeans) -> Fit:
        seen = total if self.seen is None else self.seen + total
        centroids_KD, batches = update(seen, self.centroids_KD), self.batches + 1
        window = self.window + total.inertia / max(1, int(total.counts_K.sum()))
        if batches % _WINDOW:
            return replace(self, centroids_KD=centroids_KD, batches=batches, seen=seen, window=window)
        history = (*self.inertia_history, window / _WINDOW)
        settled = len(history) > 1 and history[-2] - history[-1] < settings.tolerance * history[-2]
        if settled or len(history) > settings.max_iterations:
            return Fit(centroids_KD, stream=self.stream, restart=self.restart, dims=self.dims)
        empty = int((seen.counts_K == 0).sum())
        return replace(
            self,
            centroids_KD=centroids_KD,
            batches=batches,
            seen=seen,
            window=0.0,
            inertia_history=history,
            empty=empty,
        )


def batch_stride(frames: int) -> int:
    """How many mini-batches all frames make."""
    return max(1, frames // _BATCH_FRAMES)


def first_stride(frames: int, clusters: int) -> int:
    """The largest stride that leaves each cluster frames enough to stand for all of them; faiss's own bound for samples."""
    return next((stride for stride in (16, 4) if frames >= stride * 256 * clusters), 1)


def fit(frames_ND: np.ndarray, clusters: int, settings: Kmeans) -> Fit:
    """A whole fit in one process, of `clusters` centroids by `settings`: what learn_kmeans makes of frames in many."""
    rng = np.random.default_rng(settings.seed)
    rows = np.sort(rng.choice(len(frames_ND), size=min(SEEDING_FRAMES * clusters, len(frames_ND)), replace=False))
    start_KD = best([seed(frames_ND[rows], None, clusters, draw) for draw in rng.spawn(settings.seedings)])
    found = Fit(start_KD, first_stride(len(frames_ND), clusters))
    while not found.done:
        found = found.advance(partial(found.frames(frames_ND, 0), found.centroids_KD), settings)
    return found


def seed(
    frames_ND: np.ndarray, weights_N: np.ndarray | None, clusters: int, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Starting centroids, (K, D) float32, by one draw of greedy k-means++, and their inertia on `frames_ND`.

    `weights_N` says how many frames each one stands for; None: each for itself. Raises ValueError where there are fewer frames
    than clusters.
    """
    if len(frames_ND) < clusters:
        raise ValueError(f"{len(frames_ND)} frames cannot seed {clusters} clusters")
    frames_ND = np.ascontiguousarray(frames_ND, dtype=np.float32)
    weights_N = np.ones(len(frames_ND), np.float32) if weights_N is None else weights_N.astype(np.float32)
    seen_ND = frames_ND
    if frames_ND.shape[1] > _SEEDING_DIMS:
        seen_ND = frames_ND @ rng.standard_normal((frames_ND.shape[1], _SEEDING_DIMS), dtype=np.float32)
    centroids_KD = frames_ND[_plus_plus(seen_ND, weights_N, clusters, rng)]
    return centroids_KD, float((weights_N * assign(frames_ND, centroids_KD)[1]).sum(dtype=np.float64))


def best(seeds: list[tuple[np.ndarray, float]]) -> np.ndarray:
    """The centroids of the least inertia; the first of equals."""
    return min(seeds, key=lambda one: one[1])[0]


def _plus_plus(frames_ND: np.ndarray, weights_N: np.ndarray, clusters: int, rng: np.random.Generator) -> list[int]:
    """The frames to start from. Of 2 + ln K candidates per centroid the one that lowers the inertia most is taken."""
    trials = 2 + int(np.log(clusters))
    squares_N = np.einsum("nd,nd->n", frames_ND, frames_ND)
    chosen = [int(rng.integers(len(frames_ND)))]
    nearest_N = weights_N * _squared_distances(frames_ND, squares_N, chosen)[0]
    for _ in range(clusters - 1):
        cumulative = np.cumsum(nearest_N, dtype=np.float64)
        draws = np.searchsorted(cumulative, rng.random(trials) * cumulative[-1]).clip(max=len(frames_ND) - 1)
        distances_CN = np.minimum(weights_N * _squared_distances(frames_ND, squares_N, draws), nearest_N)
        best = int(distances_CN.sum(axis=1, dtype=np.float64).argmin())
        chosen.append(int(draws[best]))
        nearest_N = distances_CN[best]
    return chosen


def _squared_distances(frames_ND: np.ndarray, squares_N: np.ndarray, rows: np.ndarray | list[int]) -> np.ndarray:
    """Squared distances of all frames from the frames in `rows`, (C, N)."""
    cross_CN = frames_ND[rows] @ frames_ND.T
    return np.maximum(squares_N[rows][:, None] - 2 * cross_CN + squares_N[None], 0)
