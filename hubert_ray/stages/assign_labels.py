"""teacher features + codebook -> a uint16 label per frame and stream of every utterance, and how good the labels are.

Extraction and assignment are fused: features live for ten minutes of audio at a time and are never written. The next ten minutes
are read and decoded while the teacher computes, so its own forward pass is what labelling costs. What is to be told of the labels
is counted by the worker that has them in memory; a part that was there before is read for it.
HuBERT (Hsu et al. 2021) II-A, IV-B, IV-E.
"""

from __future__ import annotations

import hashlib
import io
from functools import cached_property, partial
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from hubert_ray.config.recipe import Teacher
from hubert_ray.data.collate import UtteranceReader
from hubert_ray.data.shards import AudioReader, Manifest
from hubert_ray.distributed.shard_map import shard_map
from hubert_ray.errors import LabelError
from hubert_ray.stages.context import TeacherAt, Work, teacher_at
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage
from hubert_ray.units.features import FeatureExtractor, in_groups
from hubert_ray.units.kmeans import Codebook
from hubert_ray.units.quality import PhoneCounts, entropy_bits


class Labeller:
    """Labels one shard and writes its part, unless it is there; counts its labels, and how they meet the phones."""

    def __init__(self, storage: Storage, corpus: str, folder: str, teacher: TeacherAt, codebook: Codebook, device: str):
        self._storage, self._corpus, self._folder = storage, corpus, folder
        self._reader = AudioReader(storage, corpus)
        self._teacher, self._codebook, self._device = teacher, codebook, torch.device(device)

    @cached_property
    def _extractor(self) -> FeatureExtractor:
        """Opened for the first shard that has no part yet."""
        return self._teacher.open()

    def __call__(self, shard: str) -> dict[str, Any]:
        manifest = Manifest.read_shard(self._storage, self._corpus, shard)
        part = f"{self._folder}/{layout.part(shard)}"
        if there := self._storage.exists(part):
            data = self._storage.read(part)
            table = schemas.decode(data)
        else:
            table = self._labelled(manifest)
            self._storage.write(part, data := schemas.encode(table))
        facts = {"there": there, "sha256": hashlib.sha256(data).hexdigest()}
        return facts | _counted(table, manifest, self._codebook.classes)

    def _labelled(self, manifest: Manifest) -> pa.Table:
        utterances = UtteranceReader(self._reader, manifest, normalize=False)
        labels = [
            self._codebook.labels(frames_FD, self._device).ravel()
            for features in in_groups(self._extractor, utterances)
            for frames_FD in features
        ]
        rate = pa.array(np.full(len(labels), self._extractor.frame_rate_hz, dtype=np.int16))
        ids = manifest.table["utterance_id"].combine_chunks()
        return pa.table([ids, pa.array(labels, schemas.LABELS.field("labels").type), rate], schema=schemas.LABELS)


def _counted(part: pa.Table, manifest: Manifest, classes: tuple[int, ...]) -> dict[str, Any]:
    """Of a shard and each stream: how often each label occurs, and how often with each phone."""
    labels_FS = _by_stream(pc.list_flatten(part["labels"]), classes)
    counts = [PhoneCounts(clusters) for clusters in classes]
    ids = manifest.table["utterance_id"].combine_chunks()
    phones = manifest.table["phones"].take(pc.index_in(part["utterance_id"], value_set=ids))
    for row in np.flatnonzero(pc.is_valid(phones).to_numpy()):
        known, rate = phones[int(row)].as_py(), part["frame_rate_hz"][int(row)].as_py()
        for counted, labels_F in zip(counts, _by_stream(part["labels"][int(row)].values, classes).T, strict=True):
            counted.add(known, labels_F, rate)
    return {
        "labels": labels_FS.size,
        "histograms": [
            np.bincount(labels_F, minlength=clusters).tolist()
            for labels_F, clusters in zip(labels_FS.T, classes, strict=True)
        ],
        "phones": [counted.counts() for counted in counts],
    }


def assign_labels(work: Work, teacher: Teacher, classes: tuple[int, ...]) -> dict[str, Any]:
    """Writes one label part per shard and `quality.json`; `classes` has the clusters of each label stream."""
    centroids_RD = np.load(io.BytesIO(work.inputs["codebook"].read_sealed(layout.CENTROIDS)), allow_pickle=False)
    codebook = Codebook(centroids_RD, classes)
    splits = {shard.name: shard.split for shard in work.index().shards}
    labeller = partial(
        Labeller, work.storage, work.inputs["corpus"].path, work.output.path, teacher_at(work, teacher), codebook,
        "cuda" if work.cluster.data_gpus else "cpu",
    )  # fmt: skip
    histograms = [np.zeros(clusters, dtype=np.int64) for clusters in classes]
    counts = {name: [PhoneCounts(clusters) for clusters in classes] for name in ("dev", "all")}
    parts: dict[str, str] = {}
    for row in shard_map(labeller, list(splits), work.cluster):
        parts[row["shard"]] = row["sha256"]
        if not row["there"]:
            print(f"{work.name}  {row['shard']}  {row['labels']} labels", flush=True)
        split = splits[row["shard"]]
        if split == "train":
            for histogram_K, more in zip(histograms, row["histograms"], strict=True):
                histogram_K += np.array(more)
        for name in ("all", "dev") if split == "dev" else ("all",):
            for counted, phones in zip(counts[name], row["phones"], strict=True):
                counted.merge(phones)
    facts = _facts(histograms, counts)
    for stream, clusters in zip(facts["streams"], classes, strict=True):
        used = sum(count > 0 for count in stream["histogram"])
        if used < clusters / 2:
            raise LabelError(
                f"{work.name}: only {used} of {clusters} clusters occur in the train labels. The codebook has collapsed; a model "
                "would learn a constant. Give kmeans more audio (sample_share), other seeds, or fewer clusters"
            )
    work.output.write_json(layout.QUALITY, facts | {"parts": dict(sorted(parts.items()))})
    return {key: facts[key] for key in ("train_frames", "unigram_entropy_bits", "majority_share", "quality")}


def _facts(histograms: list[np.ndarray], counts: dict[str, list[PhoneCounts]]) -> dict[str, Any]:
    """Entropy of the train labels, and quality against phones, of each stream: on the dev split where it has alignments, else on
    all. What is told of several streams together is the mean, as the loss and the accuracy of their model are."""
    measured_on = "dev" if counts["dev"][0].quality() else "all"
    streams = [_stream_facts(*pair) for pair in zip(histograms, counts[measured_on], strict=True)]
    qualities = [stream["quality"] for stream in streams]
    return {
        "train_frames": int(histograms[0].sum()),
        "unigram_entropy_bits": float(np.mean([stream["unigram_entropy_bits"] for stream in streams])),
        "majority_share": float(np.mean([stream["majority_share"] for stream in streams])),
        "quality": _mean(qualities) if qualities[0] else None,
        "measured_on": measured_on if qualities[0] else None,
        "phones": counts[measured_on][0].phones() if qualities[0] else None,
        "streams": streams,
    }


def _by_stream(labels: pa.Array | np.ndarray, classes: tuple[int, ...]) -> np.ndarray:
    """(F, S) of what tables hold frame by frame."""
    return np.asarray(labels).reshape(-1, len(classes))


def _stream_facts(histogram_K: np.ndarray, counts: PhoneCounts) -> dict[str, Any]:
    quality = counts.quality()
    return {
        "histogram": histogram_K.tolist(),
        "unigram_entropy_bits": entropy_bits(histogram_K),
        "majority_share": float(histogram_K.max() / histogram_K.sum()),
        "quality": msgspec.to_builtins(quality) if quality else None,
        "phone_counts": counts.table().tolist() if quality else None,
    }


def _mean(qualities: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the figures of several streams on the same frames."""
    means = {name: float(np.mean([quality[name] for quality in qualities])) for name in qualities[0]}
    return means | {"frames": qualities[0]["frames"]}
