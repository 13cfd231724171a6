"""teacher features + codebook -> a uint16 label per frame of every utterance, and how good the labels are.

Extraction and assignment are fused: features live for ten minutes of audio at a time and are never written.
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
from hubert_ray.units.kmeans import assign
from hubert_ray.units.quality import PhoneCounts, entropy_bits


class _Labeller:
    """Labels one shard and writes its part."""

    def __init__(self, storage: Storage, corpus: str, folder: str, teacher: TeacherAt, centroids_KD: np.ndarray):
        self._storage, self._corpus, self._folder = storage, corpus, folder
        self._reader = AudioReader(storage, corpus)
        self._extractor = teacher.open()
        self._centroids_KD = centroids_KD

    def __call__(self, shard: str) -> dict[str, Any]:
        manifest = Manifest.read_shard(self._storage, self._corpus, shard)
        utterances = UtteranceReader(self._reader, manifest, normalize=False)
        labels = [
            assign(frames_FD, self._centroids_KD)[0].astype(np.uint16)
            for features in in_groups(self._extractor, utterances)
            for frames_FD in features
        ]
        rate = pa.array(np.full(len(labels), self._extractor.frame_rate_hz, dtype=np.int16))
        ids = manifest.table["utterance_id"].combine_chunks()
        table = pa.table([ids, pa.array(labels, schemas.LABELS.field("labels").type), rate], schema=schemas.LABELS)
        self._storage.write(f"{self._folder}/{layout.part(shard)}", schemas.encode(table))
        return {"frames": sum(map(len, labels))}


def assign_labels(work: Work, teacher: Teacher, clusters: int) -> dict[str, Any]:
    """Writes one label part per shard and `quality.json`."""
    manifest = work.manifest()
    centroids_KD = np.load(io.BytesIO(work.inputs["codebook"].read(layout.CENTROIDS)), allow_pickle=False)
    shards = manifest.shards()
    missing = [s for s in shards if not work.storage.exists(work.output.file(layout.part(s)))]
    labeller = partial(
        _Labeller, work.storage, work.inputs["corpus"].path, work.output.path, teacher_at(work, teacher), centroids_KD
    )
    for row in shard_map(labeller, missing, work.cluster):
        print(f"{work.name}  {row['shard']}  {row['frames']} labels", flush=True)
    facts = _measure(work.output, work.storage, work.inputs["corpus"].path, shards, clusters)
    used = sum(count > 0 for count in facts["histogram"])
    if used < clusters / 2:
        raise LabelError(
            f"{work.name}: only {used} of {clusters} clusters occur in the train labels. The codebook has collapsed; a model "
            "would learn a constant. Give kmeans more audio (sample_share), other seeds, or fewer clusters"
        )
    work.output.write_json(layout.QUALITY, facts)
    return {key: facts[key] for key in ("train_frames", "unigram_entropy_bits", "majority_share", "quality")}


def _measure(labels: Artifact, storage: Storage, corpus: str, shards: list[str], clusters: int) -> dict[str, Any]:
    """Entropy of the train labels, and quality against phones: of the dev split where it has alignments, else of all."""
    histogram_K = np.zeros(clusters, dtype=np.int64)
    counts = {"dev": PhoneCounts(clusters), "all": PhoneCounts(clusters)}
    for shard in shards:
        part = schemas.decode(labels.read(layout.part(shard)))
        manifest = Manifest.read_shard(storage, corpus, shard).table
        rows = pc.index_in(part["utterance_id"], value_set=manifest["utterance_id"].combine_chunks())
        joined = part.append_column("split", manifest["split"].take(rows))
        joined = joined.append_column("phones", manifest["phones"].take(rows))
        train = joined.filter(pc.equal(joined["split"], "train"))
        histogram_K += np.bincount(pc.list_flatten(train["labels"]).to_numpy(), minlength=clusters)
        aligned = joined.filter(pc.is_valid(joined["phones"]))
        for row in aligned.to_pylist():
            for name in ("all", "dev") if row["split"] == "dev" else ("all",):
                counts[name].add(row["phones"], np.asarray(row["labels"]), row["frame_rate_hz"])
    measured_on = "dev" if counts["dev"].quality() else "all"
    chosen = counts[measured_on]
    quality = chosen.quality()
    return {
        "train_frames": int(histogram_K.sum()),
        "histogram": histogram_K.tolist(),
        "unigram_entropy_bits": entropy_bits(histogram_K),
        "majority_share": float(histogram_K.max() / histogram_K.sum()),
        "quality": msgspec.to_builtins(quality) if quality else None,
        "measured_on": measured_on if quality else None,
        "phones": chosen.phones() if quality else None,
        "phone_counts": chosen.table().tolist() if quality else None,
    }
