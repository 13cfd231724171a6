"""teacher features + codebook -> a uint16 label per frame and stream of every utterance, and how good the labels are.

Extraction and assignment are fused: features live for ten minutes of audio at a time and are never written. The next ten minutes
are read and decoded while the teacher computes, so its own forward pass is what labelling costs.
HuBERT (Hsu et al. 2021) II-A, IV-B, IV-E.
"""

from __future__ import annotations

import io
from functools import partial
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
from hubert_ray.storage.artifacts import Artifact
from hubert_ray.storage.filesystem import Storage
from hubert_ray.units.features import in_groups
from hubert_ray.units.kmeans import Codebook
from hubert_ray.units.quality import PhoneCounts, entropy_bits


class Labeller:
    """Labels one shard and writes its part."""

    def __init__(self, storage: Storage, corpus: str, folder: str, teacher: TeacherAt, codebook: Codebook, device: str):
        self._storage, self._corpus, self._folder = storage, corpus, folder
        self._reader = AudioReader(storage, corpus)
        self._extractor = teacher.open()
        self._codebook, self._device = codebook, torch.device(device)

    def __call__(self, shard: str) -> dict[str, Any]:
        manifest = Manifest.read_shard(self._storage, self._corpus, shard)
        utterances = UtteranceReader(self._reader, manifest, normalize=False)
        labels = [
            self._codebook.labels(frames_FD, self._device).ravel()
            for features in in_groups(self._extractor, utterances)
            for frames_FD in features
        ]
        rate = pa.array(np.full(len(labels), self._extractor.frame_rate_hz, dtype=np.int16))
        ids = manifest.table["utterance_id"].combine_chunks()
        table = pa.table([ids, pa.array(labels, schemas.LABELS.field("labels").type), rate], schema=schemas.LABELS)
        self._storage.write(f"{self._folder}/{layout.part(shard)}", schemas.encode(table))
        return {"labels": sum(map(len, labels))}


def assign_labels(work: Work, teacher: Teacher, classes: tuple[int, ...]) -> dict[str, Any]:
    """Writes one label part per shard and `quality.json`; `classes` has the clusters of each label stream."""
    centroids_RD = np.load(io.BytesIO(work.inputs["codebook"].read(layout.CENTROIDS)), allow_pickle=False)
    codebook = Codebook(centroids_RD, classes)
    shards = [shard.name for shard in work.index().shards]
    missing = [s for s in shards if not work.storage.exists(work.output.file(layout.part(s)))]
    labeller = partial(
        Labeller, work.storage, work.inputs["corpus"].path, work.output.path, teacher_at(work, teacher), codebook,
        "cuda" if work.cluster.data_gpus else "cpu",
    )  # fmt: skip
    for row in shard_map(labeller, missing, work.cluster):
        print(f"{work.name}  {row['shard']}  {row['labels']} labels", flush=True)
    facts = _measure(work.output, work.storage, work.inputs["corpus"].path, shards, classes)
    for stream, clusters in zip(facts["streams"], classes, strict=True):
        used = sum(count > 0 for count in stream["histogram"])
        if used < clusters / 2:
            raise LabelError(
                f"{work.name}: only {used} of {clusters} clusters occur in the train labels. The codebook has collapsed; a model "
                "would learn a constant. Give kmeans more audio (sample_share), other seeds, or fewer clusters"
            )
    work.output.write_json(layout.QUALITY, facts)
    return {key: facts[key] for key in ("train_frames", "unigram_entropy_bits", "majority_share", "quality")}


def _measure(
    labels: Artifact, storage: Storage, corpus: str, shards: list[str], classes: tuple[int, ...]
) -> dict[str, Any]:
    """Entropy of the train labels, and quality against phones, of each stream: on the dev split where it has alignments, else on
    all. What is told of several streams together is the mean, as the loss and the accuracy of their model are."""
    histograms = [np.zeros(clusters, dtype=np.int64) for clusters in classes]
    counts = {name: [PhoneCounts(clusters) for clusters in classes] for name in ("dev", "all")}
    for shard in shards:
        part = schemas.decode(labels.read(layout.part(shard)))
        manifest = Manifest.read_shard(storage, corpus, shard).table
        rows = pc.index_in(part["utterance_id"], value_set=manifest["utterance_id"].combine_chunks())
        joined = part.append_column("split", manifest["split"].take(rows))
        joined = joined.append_column("phones", manifest["phones"].take(rows))
        train_FS = _by_stream(pc.list_flatten(joined.filter(pc.equal(joined["split"], "train"))["labels"]), classes)
        for histogram_K, train_F in zip(histograms, train_FS.T, strict=True):
            histogram_K += np.bincount(train_F, minlength=len(histogram_K))
        aligned = joined.filter(pc.is_valid(joined["phones"]))
        for row in aligned.to_pylist():
            labels_FS = _by_stream(np.asarray(row["labels"]), classes)
            for name in ("all", "dev") if row["split"] == "dev" else ("all",):
                for counted, labels_F in zip(counts[name], labels_FS.T, strict=True):
                    counted.add(row["phones"], labels_F, row["frame_rate_hz"])
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
