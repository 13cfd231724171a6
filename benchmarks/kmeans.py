"""How fast and how good is a codebook's fit, ours on Ray workers and each installed peer's, in one run?

    python -m benchmarks.kmeans                                              733,000 made-up 39-d frames, 100 clusters
    python -m benchmarks.kmeans --audio /data/LibriSpeech --json             MFCC frames of real speech
    python -m benchmarks.kmeans --dim 768 --clusters 500 --frames 200000 --workers 1,2

The time is that of the fit itself: seeding and passes over frames that are in memory already, ours in the holders' memory.
`inertia` is the mean squared distance of all frames to their centroids at the end, reckoned alike for all. Peers are not
dependencies, but for faiss:
    sklearn   MiniBatchKMeans with fairseq's settings (`examples/hubert/simple_kmeans/learn_kmeans.py`), where it is installed
    faiss     its own Kmeans, 25 iterations on all frames
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from hubert_ray.config.cluster import Cluster
from hubert_ray.config.recipe import Kmeans
from hubert_ray.data.audio import decode
from hubert_ray.distributed.cluster import connected
from hubert_ray.distributed.kmeans_reduce import LANES, FeatureSample, subtrees
from hubert_ray.stages.learn_kmeans import first_fits
from hubert_ray.units import kmeans
from hubert_ray.units.features import MfccExtractor

BLOCKS = 90  # no multiple of the lanes or of the workers


def made_up_frames(frames: int, dim: int) -> np.ndarray:
    """(frames, dim) float32 from 2,000 overlapping Gaussians of unequal weight and width."""
    rng = np.random.default_rng(0)
    centres, widths = rng.normal(size=(2000, dim)) * 4, rng.uniform(0.5, 2.5, 2000)
    parents = rng.choice(2000, size=frames, p=rng.dirichlet(np.full(2000, 0.5)))
    noise = rng.standard_normal((frames, dim), dtype=np.float32) * widths[parents, None]
    return (centres[parents] + noise).astype(np.float32)


def _mfcc(path: Path) -> np.ndarray:
    torch.set_num_threads(1)
    return MfccExtractor()([decode(path.read_bytes())])[0]


def mfcc_frames(folder: Path) -> np.ndarray:
    """MFCC of every FLAC file under `folder`, in the order of their paths."""
    with ProcessPoolExecutor() as pool:
        return np.concatenate(list(pool.map(_mfcc, sorted(folder.rglob("*.flac")), chunksize=16)))


def inertia(frames_ND: np.ndarray, centroids_KD: np.ndarray) -> float:
    """Mean squared distance to the nearest centroid."""
    return float(kmeans.assign(frames_ND, centroids_KD)[1].mean(dtype=np.float64))


class _Block:
    """Gives the holders their frames."""

    def __init__(self, path: Path):
        self._frames_ND = np.load(path, mmap_mode="r")

    def __call__(self, shard: str) -> np.ndarray:
        return np.array_split(self._frames_ND, BLOCKS)[int(shard)]


@dataclass(frozen=True)
class OurFit:
    """The fit of one number of workers."""

    seconds: list[float]  # of each repetition
    pass_seconds: float  # of a pass over all frames
    fit: kmeans.Fit


def ours(path: Path, settings: Kmeans, workers: int, repeats: int) -> OurFit:
    """The frames are in the holders' memory before the clock starts."""
    cluster = Cluster(kmeans_workers=workers, data_workers=workers, data_cpus=0.5)
    seconds, pass_seconds = [], []
    with FeatureSample(partial(_Block, path), [str(block) for block in range(BLOCKS)], cluster) as sample:
        start = [kmeans.Fit(sample.draw(settings.classes[0], np.random.default_rng(0)))]
        sample.reduce(start)  # the workers' imports
        for _ in range(repeats):
            begun = time.perf_counter()
            fits = first_fits(sample, settings)
            while not all(fit.done for fit in fits):
                fits = sample.one_pass(fits, settings)
            seconds.append(time.perf_counter() - begun)
        for _ in range(5):
            begun = time.perf_counter()
            sample.reduce(start)
            pass_seconds.append(time.perf_counter() - begun)
    return OurFit(seconds, min(pass_seconds), min(fits, key=lambda fit: fit.inertia_history[-1]))


def sklearn(frames_ND: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans

    fit = MiniBatchKMeans(
        n_clusters=clusters,
        init="k-means++",
        max_iter=100,
        batch_size=10_000,
        tol=0.0,
        max_no_improvement=100,
        n_init=20,
        reassignment_ratio=0.0,
        compute_labels=False,
        random_state=seed,
    )
    return fit.fit(frames_ND).cluster_centers_


def faiss_kmeans(frames_ND: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    fit = faiss.Kmeans(frames_ND.shape[1], clusters, niter=25, max_points_per_centroid=len(frames_ND), seed=seed)
    fit.train(frames_ND)
    return np.asarray(fit.centroids)


PEERS: dict[str, tuple[str, Callable[[np.ndarray, int, int], np.ndarray]]] = {  # name -> (package, fit)
    "sklearn": ("sklearn", sklearn),
    "faiss": ("faiss", faiss_kmeans),
}


def _bytes_a_pass(workers: int, clusters: int, dim: int) -> int:
    """Centroids to each worker, and back the float64 sums and counts of the subtrees it has: the frames stay where they are."""
    bounds = [worker * LANES // workers for worker in range(workers + 1)]
    back = sum(len(subtrees(range(start, stop))) for start, stop in pairwise(bounds))
    return workers * clusters * dim * 4 + back * clusters * (dim + 1) * 8


def measure(options: argparse.Namespace) -> dict:
    """Every figure of one run."""
    frames_ND = mfcc_frames(options.audio) if options.audio else made_up_frames(options.frames, options.dim)
    settings = Kmeans(
        clusters=options.clusters, seed=options.seed, algorithm=options.algorithm, seeding=options.seeding
    )
    dim = frames_ND.shape[1]
    result: dict = {"frames": len(frames_ND), "dim": dim, "clusters": options.clusters, "seed": options.seed}
    result |= {"algorithm": options.algorithm, "seeding": options.seeding}
    result["audio"] = "MFCC" if options.audio else "made up"
    peers = {}
    for name, (package, fit) in PEERS.items():
        if importlib.util.find_spec(package):
            seconds = []
            fit(frames_ND[: 100 * options.clusters], options.clusters, options.seed)  # its imports
            for _ in range(options.repeats):
                begun = time.perf_counter()
                centroids_KD = fit(frames_ND, options.clusters, options.seed)
                seconds.append(time.perf_counter() - begun)
            mean = inertia(frames_ND, centroids_KD)
            peers[name] = {"seconds": round(statistics.median(seconds), 2), "inertia": round(mean, 2)}
    workers: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        np.save(path := Path(folder) / "frames.npy", frames_ND)
        for count in map(int, options.workers.split(",")):
            with connected(Cluster(kmeans_workers=count)):
                found = ours(path, settings, count, options.repeats)
            workers[str(count)] = {
                "seconds": round(statistics.median(found.seconds), 2),
                "inertia": round(inertia(frames_ND, found.fit.centroids_KD), 2),
                "passes": len(found.fit.inertia_history),
                "pass_seconds": round(found.pass_seconds, 3),
                "bytes_a_pass": _bytes_a_pass(count, options.clusters, dim),
                "centroids_sha256": hashlib.sha256(found.fit.centroids_KD.tobytes()).hexdigest()[:16],
            }
    fastest = min(workers.values(), key=lambda row: row["seconds"])
    return result | {"ours": fastest, "peers": peers, "workers": workers}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kmeans", description=__doc__.splitlines()[0])
    parser.add_argument("--audio", type=Path, help="a folder of FLAC files, whose MFCC frames are clustered")
    parser.add_argument("--frames", type=int, default=733_000, help="made-up frames, without --audio")
    parser.add_argument("--dim", type=int, default=39, help="of made-up frames")
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algorithm", choices=("lloyd", "mini_batch"), default="lloyd", help="of ours")
    parser.add_argument("--seeding", choices=("plus_plus", "parallel"), default="plus_plus", help="of ours")
    parser.add_argument("--workers", default="1,2", help="numbers of holders, each measured on its own")
    parser.add_argument("--repeats", type=int, default=3, help="fits of everyone, of which the median counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if min(options.clusters - 1, options.repeats, options.dim, *map(int, options.workers.split(","))) < 1:
        parser.error("expected --clusters from 2, --repeats, --dim and --workers from 1")
    if not options.audio and options.frames < 100 * options.clusters:
        parser.error(f"expected --frames from {100 * options.clusters} for {options.clusters} clusters")
    result = measure(options)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{result['frames']} frames ({result['audio']}), {result['dim']}-d, {result['clusters']} clusters")
    rows = {f"ours, {count} workers": row for count, row in result["workers"].items()} | result["peers"]
    for name, row in rows.items():
        passes = f"   {row['passes']} full passes, {row['pass_seconds']} s each" if "passes" in row else ""
        print(f"{name:18} {row['seconds']:8.2f} s   inertia {row['inertia']:10.2f}{passes}")


if __name__ == "__main__":
    main()
