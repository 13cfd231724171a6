"""teacher features of the train split -> a codebook of K centroids.

Features are streamed from the audio shards; a seeded sample of utterances stays in the memory of Ray actors, where
k-means++ and Lloyd's algorithm run on it. Dev and test audio is never clustered. HuBERT (Hsu et al. 2021) II-A, II-D, IV-B.
"""

from __future__ import annotations

import io
import zlib
from functools import partial
from typing import Any

import numpy as np

from hubert_ray.config.recipe import Kmeans, Teacher
from hubert_ray.data.collate import UtteranceReader
from hubert_ray.data.shards import AudioReader, Manifest
from hubert_ray.distributed.kmeans_reduce import FeatureSample
from hubert_ray.errors import RecipeError
from hubert_ray.stages.context import TeacherAt, Work, teacher_at
from hubert_ray.storage import layout
from hubert_ray.storage.filesystem import Storage
from hubert_ray.units import kmeans as lloyd

SEEDING_FRAMES = 30_000  # scikit-learn's default init_size for fairseq's batches of 10,000
GROUP_SECONDS = 600.0  # of audio that is decoded at a time
_PROGRESS = "progress.npz"


class _SampledFrames:
    """The teacher's features of a share of a shard's train utterances, drawn without replacement."""

    def __init__(self, storage: Storage, corpus: str, teacher: TeacherAt, settings: Kmeans):
        self._storage, self._corpus, self._settings = storage, corpus, settings
        self._reader = AudioReader(storage, corpus)
        self._extractor = teacher.open()

    def __call__(self, shard: str) -> np.ndarray:
        manifest = Manifest.read_shard(self._storage, self._corpus, shard).split("train")
        rng = np.random.default_rng([self._settings.seed, zlib.crc32(shard.encode())])
        count = int(np.ceil(self._settings.sample_share * len(manifest)))
        rows = np.sort(rng.choice(len(manifest), size=count, replace=False))
        sampled = UtteranceReader(self._reader, Manifest(manifest.table.take(rows)), normalize=False)
        frames = [
            frames_FD
            for group in sampled.groups(GROUP_SECONDS)
            for frames_FD in self._extractor([sampled.wave(row) for row in group])
        ]
        return np.concatenate(frames) if frames else np.empty((0, self._extractor.dim), dtype=np.float32)


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
        centroids_KD, history, empty = _fit(work, sample, kmeans)
        frames = sample.frames
    work.storage.write(work.output.file(layout.CENTROIDS), _npy(centroids_KD))
    facts = {"inertia_history": history, "frames": frames, "empty_clusters": empty}
    work.output.write_json(layout.HISTORY, facts)
    work.storage.delete(work.output.file(_PROGRESS))
    return {"frames": frames, "passes": len(history), "inertia": history[-1]}


def _fit(work: Work, sample: FeatureSample, settings: Kmeans) -> tuple[np.ndarray, list[float], int]:
    """Lloyd passes until the inertia settles; goes on from the last finished pass of a killed run."""
    centroids_KD, history = _resume(work)
    if centroids_KD is None:
        rng = np.random.default_rng(settings.seed)
        subsample_ND = sample.draw(max(SEEDING_FRAMES, 30 * settings.clusters), rng)
        centroids_KD = lloyd.seed(subsample_ND, settings.clusters, settings.seedings, rng)
    while True:
        total = sample.reduce(centroids_KD)
        history.append(total.inertia / sample.frames)
        empty = int((total.counts_K == 0).sum())
        print(
            f"{work.name}  pass {len(history):>3}  mean squared distance {history[-1]:.4f}  empty {empty}", flush=True
        )
        settled = len(history) > 1 and history[-2] - history[-1] < settings.tolerance * history[-2]
        if len(history) > settings.max_iterations or (settled and not empty):
            return centroids_KD, history, empty  # the centroids that the last inertia belongs to
        centroids_KD = lloyd.update(total, centroids_KD)
        _save(work, centroids_KD, history)


def _save(work: Work, centroids_KD: np.ndarray, history: list[float]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, centroids=centroids_KD, history=np.array(history))
    work.storage.write(work.output.file(_PROGRESS), buffer.getvalue())


def _resume(work: Work) -> tuple[np.ndarray | None, list[float]]:
    if not work.storage.exists(work.output.file(_PROGRESS)):
        return None, []
    with np.load(io.BytesIO(work.output.read(_PROGRESS))) as saved:
        return saved["centroids"], saved["history"].tolist()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
