"""teacher features of the train split -> a codebook: K centroids, or those of several label streams.

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
from hubert_ray.data.shards import AudioReader, Manifest, draw_share
from hubert_ray.distributed.kmeans_reduce import FeatureSample
from hubert_ray.errors import RecipeError, TrainingError
from hubert_ray.stages.context import TeacherAt, Work, teacher_at
from hubert_ray.storage import layout
from hubert_ray.storage.filesystem import Storage
from hubert_ray.units import kmeans as lloyd
from hubert_ray.units.features import in_groups
from hubert_ray.units.kmeans import Fit, MiniBatchFit

_PROGRESS = "progress.npz"


class _SampledFrames:
    """The teacher's features of a share of a shard's train utterances, drawn without replacement."""

    def __init__(self, storage: Storage, corpus: str, teacher: TeacherAt, settings: Kmeans):
        self._storage, self._corpus, self._settings = storage, corpus, settings
        self._reader = AudioReader(storage, corpus)
        self._extractor = teacher.open()

    def __call__(self, shard: str) -> np.ndarray:
        manifest = Manifest.read_shard(self._storage, self._corpus, shard)
        rows = draw_share(len(manifest), self._settings.sample_share, self._settings.seed, shard)
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
    """Writes `centroids.npy` (K, D) float32, those of several streams one under another, and `history.json` (mean squared distance
    per pass)."""
    corpus = work.inputs["corpus"].path
    shards = [shard.name for shard in work.index().split("train").shards]
    source = partial(_SampledFrames, work.storage, corpus, teacher_at(work, teacher), kmeans)
    with FeatureSample(source, shards, work.cluster) as sample:
        if sample.frames < max(kmeans.classes):
            raise RecipeError(
                f"{work.name}: {sample.frames} feature frames for {max(kmeans.classes)} clusters; raise kmeans.sample_share, "
                "lower kmeans.clusters, or give more audio"
            )
        fits = _resume(work) or first_fits(sample, kmeans)
        while not all(fit.done for fit in fits):
            before, fits = fits, sample.one_pass(fits, kmeans)
            _show(work, kmeans, before, fits)
            if not any(isinstance(fit, MiniBatchFit) for fit in fits):  # those are quick, and begin again
                _save(work, fits)
        frames = sample.frames
    streams = [[fit for fit in fits if fit.stream == stream] for stream in range(len(kmeans.classes))]
    best = [min(restarts, key=lambda fit: fit.inertia_history[-1]) for restarts in streams]
    work.storage.write(work.output.file(layout.CENTROIDS), _npy(np.concatenate([fit.centroids_KD for fit in best])))
    histories = [
        {
            "inertia_history": fit.inertia_history,
            "empty_clusters": fit.empty,
            "restarts": [restart.inertia_history[-1] for restart in restarts],
        }
        for fit, restarts in zip(best, streams, strict=True)
    ]
    work.output.write_json(layout.HISTORY, {"frames": frames, "streams": histories})
    work.storage.delete(work.output.file(_PROGRESS))
    return {
        "frames": frames,
        "passes": [len(fit.inertia_history) for fit in best],
        "inertia": [fit.inertia_history[-1] for fit in best],
    }


def first_fits(sample: FeatureSample, settings: Kmeans) -> list[Fit]:
    """The restarts of every stream before their first pass. Each stream begins with the seed, as if it were the only one; its
    restarts are seeded from one subsample, each by draws of its own."""
    fits, streams = [], len(settings.classes)
    for stream, clusters in enumerate(settings.classes):
        rng = np.random.default_rng(settings.seed)
        frames_ND, weights_N = sample.draw(lloyd.SEEDING_FRAMES * clusters, rng), None
        width = frames_ND.shape[1]
        dims = lloyd.part_of(width, stream, streams) if settings.product else (0, width)
        frames_ND, stride = frames_ND[:, slice(*dims)], lloyd.first_stride(sample.frames, clusters)
        if settings.seeding == "parallel":
            frames_ND, weights_N = sample.oversample(clusters, stride, dims, rng)
        seeds = sample.seed(frames_ND, clusters, rng.spawn(settings.restarts * settings.seedings), weights_N)
        for restart in range(settings.restarts):
            centroids_KD = lloyd.best(seeds[restart :: settings.restarts])
            if settings.algorithm == "lloyd":
                fits.append(Fit(centroids_KD, stride, stream, restart, dims))
            else:
                batches = lloyd.batch_stride(sample.frames)
                fits.append(MiniBatchFit(centroids_KD, batches, stream, restart, dims, seed=settings.seed))
    return fits


def _show(work: Work, kmeans: Kmeans, before: list[Fit], fits: list[Fit]) -> None:
    """Tells what is new since the pass before."""
    for old, fit in zip(before, fits, strict=True):
        which = f"  stream {fit.stream + 1}" if len(kmeans.classes) > 1 else ""
        which += f"  restart {fit.restart + 1}" if kmeans.restarts > 1 else ""
        if fit.inertia_history and fit.inertia_history != old.inertia_history:
            print(
                f"{work.name}{which}  {fit.progress()}  mean squared distance {fit.inertia_history[-1]:.4f}  "
                f"empty {fit.empty}",
                flush=True,
            )


def _save(work: Work, fits: list[Fit]) -> None:
    buffer = io.BytesIO()
    centroids = {f"centroids_{number}": fit.centroids_KD for number, fit in enumerate(fits)}
    state = [{name: value for name, value in vars(fit).items() if name != "centroids_KD"} for fit in fits]
    np.savez(buffer, allow_pickle=False, state=np.array(json.dumps(state)), **centroids)
    work.storage.write(work.output.file(_PROGRESS), buffer.getvalue())


def _resume(work: Work) -> list[Fit]:
    if not work.storage.exists(work.output.file(_PROGRESS)):
        return []
    with np.load(io.BytesIO(work.output.read(_PROGRESS))) as saved:
        state = json.loads(str(saved["state"]))
        lists: list[dict[str, Any]] = [
            {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()} for fields in state
        ]
        return [Fit(saved[f"centroids_{number}"], **fields) for number, fields in enumerate(lists)]


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
