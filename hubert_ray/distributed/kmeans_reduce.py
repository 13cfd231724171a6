"""Where do centroids meet across workers? Feature blocks live in actors; their partial sums are added in a fixed order.

A *block* is the sampled frames of one shard. Ray Data workers extract a block and hand it to the actor (`BlockHolder`) that
owns it; it stays there for the whole fit, and no feature is written anywhere. A shard belongs to *lane* position x LANES /
shards, which no worker count changes. Within a lane blocks are added in order of position; lanes are the leaves of
one binary tree, in which neighbours are added. Floating-point sums therefore always nest the same way: centroids are bit-equal
for any number of holders. A holder has neighbouring lanes, and sends the sums of the largest subtrees that it has whole: one
table of K x D numbers for a power of two of holders, a few otherwise.

A holder that dies takes its blocks along. They are extracted again onto its successor, and the pass is repeated with the
same centroids, so the result does not change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial as bind
from typing import Any, Protocol

import numpy as np
import ray
import ray.exceptions
import torch

from hubert_ray.config.cluster import Cluster
from hubert_ray.config.recipe import Kmeans
from hubert_ray.distributed.shard_map import shard_map
from hubert_ray.errors import TrainingError
from hubert_ray.units import kmeans
from hubert_ray.units.kmeans import Fit, Partial

LANES = 64  # as many as there may be holders: config/cluster.py, kmeans_workers
ROUNDS = 5  # of k-means‖; Bahmani et al. find no gain in more
Subtree = tuple[int, int]  # (first lane, number of lanes, a power of two that divides the first)
Sums = dict[Subtree, list[Partial] | None]  # None: no lane of it has a block
_IN_A_CALL = 65_536  # bytes that are quicker sent with each call than fetched from the object store
_SLICE = 2**24  # bytes of features in the object store at a time, per extraction worker
_DEAD = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)  # what is raised for a holder that is gone
LOST = -1  # in place of a number of frames: the holder died before it had the block
logger = logging.getLogger(__name__)


class BlockSource(Protocol):
    """Made once per extraction worker; gives the sampled frames of a shard, (N, D) float32, N may be 0."""

    def __call__(self, shard: str, /) -> np.ndarray: ...


@ray.remote(scheduling_strategy="SPREAD")
class BlockHolder:
    """Keeps feature blocks in memory and reduces them."""

    def __init__(self, shards: int, device: str) -> None:
        self._shards = shards
        self._device = torch.device(device)
        self._blocks: dict[int, np.ndarray] = {}

    def put(self, position: int, frames: int, start: int, slice_ND: np.ndarray) -> None:
        """Takes a slice of a block of so many frames; the extraction worker waits for this, which is the back-pressure."""
        if start == 0:  # of this shard, or of another try at it
            self._blocks[position] = np.empty((frames, slice_ND.shape[1]), slice_ND.dtype)
        self._blocks[position][start : start + len(slice_ND)] = slice_ND

    def positions(self) -> list[int]:
        return sorted(self._blocks)

    def rows(self, wanted: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Chosen rows of chosen blocks, for seeding."""
        return {position: self._blocks[position][rows] for position, rows in wanted.items()}

    def seed(
        self, frames: tuple[np.ndarray, np.ndarray | None] | None, clusters: int, draws: dict[int, np.random.Generator]
    ) -> dict[int, tuple[np.ndarray, float]]:
        """Starting centroids from (frames, their weights), by the number of the draw; `frames` are None where it has none."""
        return {number: kmeans.seed(*frames, clusters, rng) for number, rng in draws.items()} if frames else {}

    def far_rows(self, fit: Fit, share: float, key: int) -> dict[int, np.ndarray]:
        """Frames drawn with a chance of `share` times their squared distance to the nearest centroid, by block."""
        found = {}
        for position, block_ND in self._blocks.items():
            frames_ND = np.asarray(fit.frames(block_ND, position), dtype=np.float32)
            chances_N = share * kmeans.assign(frames_ND, fit.centroids_KD, self._device)[1]
            found[position] = frames_ND[np.random.default_rng([key, position]).random(len(frames_ND)) < chances_N]
        return found

    def reduce(self, fits: Sequence[Fit], lanes: range) -> Sums:
        """The sums of the largest subtrees within `lanes`, for the next pass of each fit."""
        leaves: Sums = {}
        for position in sorted(self._blocks):
            block_ND = self._blocks[position]
            parts = [kmeans.partial(fit.frames(block_ND, position), fit.centroids_KD, self._device) for fit in fits]
            leaf = (lane_of(position, self._shards), 1)
            leaves[leaf] = _added(leaves.get(leaf), parts)
        return {tree: tree_sum(tree, leaves) for tree in subtrees(lanes)}


def lane_of(position: int, shards: int) -> int:
    """The lane of a shard: shards spread evenly over the lanes, so that each holder gets its part of few shards too."""
    return position * LANES // shards


def subtrees(lanes: range) -> list[Subtree]:
    """The fewest whole subtrees that cover neighbouring lanes."""
    found, start = [], lanes.start
    while start < lanes.stop:
        size = start & -start or LANES  # the largest that may begin here
        while start + size > lanes.stop:
            size //= 2
        found.append((start, size))
        start += size
    return found


def tree_sum(tree: Subtree, known: Sums) -> list[Partial] | None:
    """The sum of a subtree from those of its parts; None where no lane of it has a block."""
    start, size = tree
    if tree in known or size == 1:
        return known.get(tree)
    left, right = (tree_sum((start + skip, size // 2), known) for skip in (0, size // 2))
    return left if right is None else _added(left, right)


def _added(left: list[Partial] | None, right: list[Partial]) -> list[Partial]:
    return right if left is None else [a + b for a, b in zip(left, right, strict=True)]


def _far_rows(fit: ray.ObjectRef, share: float, key: int, holder: Any) -> ray.ObjectRef:
    return holder.far_rows.remote(fit, share, key)


def _new_holder(cluster: Cluster, shards: int) -> Any:
    device = "cuda" if cluster.kmeans_gpus else "cpu"
    options = {"num_cpus": cluster.kmeans_cpus, "num_gpus": cluster.kmeans_gpus}
    return BlockHolder.options(**options).remote(shards, device)  # type: ignore[attr-defined]  # mypy does not see what a class decorator returns


class _Extract:
    """A shard worker that makes a block and hands it to its holder."""

    def __init__(self, factory: Callable[[], BlockSource], owner: dict[str, tuple[int, Any]]):
        self._source = factory()
        self._owner = owner

    def __call__(self, shard: str) -> dict[str, Any]:
        position, holder = self._owner[shard]
        block_ND = self._source(shard)
        rows = max(1, _SLICE // max(1, block_ND[:1].nbytes))
        try:
            for start in range(0, max(1, len(block_ND)), rows):
                ray.get(holder.put.remote(position, len(block_ND), start, block_ND[start : start + rows]))
        except _DEAD:
            return {"position": position, "frames": LOST}
        return {"position": position, "frames": len(block_ND)}


class FeatureSample:
    """The sampled frames of a corpus, spread over holders. A context manager: the memory is freed at its end."""

    def __init__(self, factory: Callable[[], BlockSource], shards: list[str], cluster: Cluster):
        self._factory = factory
        self._shards = list(shards)
        self._cluster = cluster
        self._failures = 0
        self._holders = [_new_holder(cluster, len(shards)) for _ in range(min(cluster.kmeans_workers, len(shards)))]
        self._frames: dict[int, int] = {}

    def __enter__(self) -> FeatureSample:
        self._fill(range(len(self._shards)))
        return self

    def __exit__(self, *_: object) -> None:
        for holder in self._holders:
            ray.kill(holder)

    @property
    def frames(self) -> int:
        return sum(self._frames.values())

    def _lanes(self, holder: int) -> range:
        """A holder's lanes lie side by side."""
        return range(holder * LANES // len(self._holders), (holder + 1) * LANES // len(self._holders))

    def _holder_of(self, position: int) -> int:
        lane = lane_of(position, len(self._shards))
        return next(holder for holder in range(len(self._holders)) if lane in self._lanes(holder))

    def _fill(self, positions: Iterable[int]) -> None:
        owner = {self._shards[p]: (p, self._holders[self._holder_of(p)]) for p in positions}
        lost = set()
        for row in shard_map(bind(_Extract, self._factory, owner), list(owner), self._cluster):
            self._frames[row["position"]] = row["frames"]
            if row["frames"] == LOST:
                lost.add(self._holder_of(row["position"]))
        if lost:
            self._rebuild(sorted(lost))

    def _ask(self, call: Callable[[Any], ray.ObjectRef]) -> list[Any]:
        """One answer per holder, rebuilding the blocks of holders that are lost on the way."""
        while True:
            pending = [call(holder) for holder in self._holders]
            answers, lost = [], []
            for index, reference in enumerate(pending):
                try:
                    answers.append(ray.get(reference))
                except _DEAD:
                    lost.append(index)
            if not lost:
                return answers
            self._rebuild(lost)

    def _rebuild(self, lost: list[int]) -> None:
        if self._failures >= self._cluster.max_failures:
            raise TrainingError(
                f"k-means lost {self._failures + 1} feature holders, more than max_failures = {self._cluster.max_failures}. "
                "If they ran out of memory, raise kmeans_workers or lower kmeans.sample_share"
            )
        self._failures += 1
        logger.warning("k-means: %d feature holder(s) lost; extracting their blocks again", len(lost))
        for index in lost:
            self._holders[index] = _new_holder(self._cluster, len(self._shards))
        self._fill([p for p in range(len(self._shards)) if self._holder_of(p) in lost])

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """`count` distinct frames of the sample (all, if there are fewer), the same for any number of holders."""
        sizes = np.array([self._frames[p] for p in range(len(self._shards))])
        bounds = np.cumsum(sizes)
        chosen = np.sort(rng.choice(self.frames, size=min(count, self.frames), replace=False))
        block = np.searchsorted(bounds, chosen, side="right")
        wanted = {int(p): chosen[block == p] - (bounds[p] - sizes[p]) for p in np.unique(block)}

        owner = {p: self._holder_of(p) for p in wanted}

        def ask(holder: Any) -> ray.ObjectRef:
            mine = self._holders.index(holder)
            return holder.rows.remote({p: rows for p, rows in wanted.items() if owner[p] == mine})

        found = {p: rows for answer in self._ask(ask) for p, rows in answer.items()}
        return np.concatenate([found[p] for p in sorted(found)])

    def seed(
        self,
        frames_ND: np.ndarray,
        clusters: int,
        draws: list[np.random.Generator],
        weights_N: np.ndarray | None = None,
    ) -> list[tuple[np.ndarray, float]]:
        """`units.kmeans.seed` with each generator of `draws`, shared out among the holders."""
        frames, holders = ray.put((frames_ND, weights_N)), len(self._holders)

        def ask(holder: Any) -> ray.ObjectRef:
            mine = {n: draws[n] for n in range(self._holders.index(holder), len(draws), holders)}
            return holder.seed.remote(frames if mine else None, clusters, mine)  # a node without a draw fetches nothing

        found = {number: one for answer in self._ask(ask) for number, one in answer.items()}
        return [found[number] for number in range(len(draws))]

    def oversample(
        self, clusters: int, stride: int, dims: tuple[int, int], rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Candidates (M, D) for starting centroids, and the number of frames that each is the nearest of, (M,): k-means‖
        (Bahmani et al. 2012) in five rounds of about 2 x `clusters` draws, over every `stride`th frame of each block.

        Not the default: on MFCC with 100 clusters it starts 3 to 4 % lower than k-means++ on a subsample (inertia 1681 to 1687, not
        1733 to 1745, three seeds each), and ends where that does (1349 to 1352, and 1350 to 1351). On one core with 122,000 frames
        it took twice the processor time of that seeding, which here is spread over the holders."""
        candidates_MD = np.asarray(self.draw(1, rng)[:, slice(*dims)], dtype=np.float32)
        for _ in range(ROUNDS):
            fit = Fit(candidates_MD, stride, dims=dims)
            inertia, key = self.reduce([fit])[0].inertia, int(rng.integers(2**63))
            if inertia:
                call = bind(_far_rows, ray.put(fit), 2 * clusters / inertia, key)
                found = {position: rows for answer in self._ask(call) for position, rows in answer.items()}
                candidates_MD = np.concatenate([candidates_MD, *(found[position] for position in sorted(found))])
        return candidates_MD, self.reduce([Fit(candidates_MD, stride, dims=dims)])[0].counts_K

    def one_pass(self, fits: Sequence[Fit], settings: Kmeans) -> list[Fit]:
        """Every fit that is not done, one pass further; they share the way over the frames."""
        totals = iter(self.reduce([fit for fit in fits if not fit.done]))
        return [fit if fit.done else fit.advance(next(totals), settings) for fit in fits]

    def reduce(self, fits: Sequence[Fit]) -> list[Partial]:
        """The sums over the frames of each fit's next pass."""
        shared = list(fits) if sum(fit.centroids_KD.nbytes for fit in fits) < _IN_A_CALL else ray.put(list(fits))
        known: Sums = {}
        for answer in self._ask(lambda holder: holder.reduce.remote(shared, self._lanes(self._holders.index(holder)))):
            known |= answer
        total = tree_sum((0, LANES), known)
        assert total is not None
        return total
