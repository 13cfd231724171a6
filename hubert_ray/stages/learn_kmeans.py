"""teacher features of the train split -> a codebook of K centroids.

Features are streamed from the audio shards; a seeded sample of utterances stays in the memory of Ray actors, where
k-means++ and Lloyd's algorithm run on it. Dev and test audio is never clustered. HuBERT (Hsu et al. 2021) II-A, II-D, IV-B.
"""

from __future__ import annotations

import io
import json
from functools import partial
from typing import Any

import numpy as np

from hubert_ray.config.recipe import Kmeans, Teacher
from hubert_ray.data.collate import UtteranceReader
from hubert_ray.data.shards import AudioReader, Manifest
from hubert_ray.distributed.kmeans_reduce import FeatureSample
from hubert_ray.errors import RecipeError, TrainingError
from hubert_ray.stages.context import TeacherAt, Work, teacher_at
from hubert_ray.storage import layout
from hubert_ray.storage.filesystem import Storage
from hubert_ray.units import kmeans as lloyd
from hubert_ray.units.features import in_groups
from hubert_ray.units.kmeans import Fit

SEEDING_FRAMES = 100  # per cluster; with fewer k-means++ goes for outliers, more only take longer
_PROGRESS = "progress.npz"


class _SampledFrames:
    """The teacher's features of a share of a shard's train utterances, drawn without replacement."""

    def __init__(self, storage: Storage, corpus: str, teacher: TeacherAt, settings: Kmeans):
        self._storage, self._corpus, self._settings = storage, corpus, settings
        self._reader = AudioReader(storage, corpus)
        self._extractor = teacher.open()

    def __call__(self, shard: str) -> np.ndarray:
        manifest = Manifest.read_shard(self._storage, self._corpus, shard).split("train")
        rows = manifest.sample(self._settings.sample_share, self._settings.seed, shard)
        sampled = UtteranceReader(self._reader, Manifest(manifest.table.take(rows)), normalize=False)
        frames = [frames_FD for features in in_groups(self._extractor, sampled) for frames_FD in features]
        dtype = np.float16 if self._settings.half_precision else np.float32
        if not frames:
            return np.empty((0, self._extractor.dim), dtype)
        with np.errstate(over="ignore"):  # told below
            block_FD = np.concatenate(frames).astype(dtype, copy=False)
        if not np.isfinite(block_FD).all():
            raise TrainingError(
                f"shard {shard}: features beyond what {np.dtype(dtype)} holds, or not a number; "
                + ("set kmeans.half_precision=false" if dtype == np.float16 else "has the teacher's training diverged?")
            )
        return block_FD


def learn_kmeans(work: Work, teacher: Teacher, kmeans: Kmeans) -> dict[str, Any]:
    """Writes `centroids.npy` (K, D) float32 and `history.json` (mean squared distance per pass)."""
    corpus = work.inputs["corpus"].path
    shards = work.manifest().split("train").shards()
    source = partial(_SampledFrames, work.storage, corpus, teacher_at(work, teacher), kmeans)
    with FeatureSample(source, shards, work.cluster) as sample:
        if sample.frames < kmeans.clusters:
            raise RecipeError(
                f"{work.name}: {sample.frames} feature frames for {kmeans.clusters} clusters; raise kmeans.sample_share, "
                "lower kmeans.clusters, or give more audio"
            )
        fits = _resume(work) or first_fits(sample, kmeans)
        while not all(fit.done for fit in fits):
            fits = sample.lloyd_pass(fits, kmeans)
            _show(work, fits)
            _save(work, fits)
        frames = sample.frames
    best = min(fits, key=lambda fit: fit.inertia_history[-1])
    work.storage.write(work.output.file(layout.CENTROIDS), _npy(best.centroids_KD))
    facts = {
        "inertia_history": best.inertia_history,
        "frames": frames,
        "empty_clusters": best.empty,
        "restarts": [fit.inertia_history[-1] for fit in fits],
    }
    work.output.write_json(layout.HISTORY, facts)
    work.storage.delete(work.output.file(_PROGRESS))
    return {"frames": frames, "passes": len(best.inertia_history), "inertia": best.inertia_history[-1]}


def first_fits(sample: FeatureSample, settings: Kmeans) -> list[Fit]:
    """The restarts before their first pass: seeded from one subsample, each by draws of its own."""
    rng = np.random.default_rng(settings.seed)
    subsample_ND = sample.draw(SEEDING_FRAMES * settings.clusters, rng)
    stride = lloyd.first_stride(sample.frames, settings.clusters)
    return [
        Fit(lloyd.seed(subsample_ND, settings.clusters, settings.seedings, rng), stride)
        for _ in range(settings.restarts)
    ]


def _show(work: Work, fits: list[Fit]) -> None:
    for number, fit in enumerate(fits, start=1):
        which = f"  restart {number}" if len(fits) > 1 else ""
        if fit.inertia_history:
            frames = "all frames" if fit.stride == 1 else f"1/{fit.stride} of the frames"
            print(
                f"{work.name}{which}  pass {len(fit.inertia_history):>3} over {frames}  mean squared distance "
                f"{fit.inertia_history[-1]:.4f}  empty {fit.empty}",
                flush=True,
            )


def _save(work: Work, fits: list[Fit]) -> None:
    buffer = io.BytesIO()
    state = [(fit.stride, fit.inertia_history, fit.empty, fit.done) for fit in fits]
    np.savez(buffer, centroids=np.stack([fit.centroids_KD for fit in fits]), state=np.array(json.dumps(state)))
    work.storage.write(work.output.file(_PROGRESS), buffer.getvalue())


def _resume(work: Work) -> list[Fit]:
    if not work.storage.exists(work.output.file(_PROGRESS)):
        return []
    with np.load(io.BytesIO(work.output.read(_PROGRESS))) as saved:
        state = json.loads(str(saved["state"]))
        return [
            Fit(centroids_KD, stride, tuple(history), empty, done)
            for centroids_KD, (stride, history, empty, done) in zip(saved["centroids"], state, strict=True)
        ]


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
