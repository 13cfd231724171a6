"""any model or MFCC -> its features of a whole corpus on disk, for other tools. Nothing in a recipe needs them.

    <storage>/runs/<run>/extract_features/<name>/parts/<shard>.arrow    one Arrow file per audio shard
        utterance_id  string
        features      list<fixed_size_list<float16 or float32>[width]>, one per frame
        frame_rate_hz int16

    table = pyarrow.ipc.open_file(pyarrow.memory_map(path)).read_all()
    features_FD = table["features"][0].values.flatten().to_numpy().reshape(-1, width)      # no copy

The features are those that learn_kmeans and assign_labels compute and let go. Features are large, so the bytes are told before
the first is written; a killed command goes on with the shards that are missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hubert_ray.config.recipe import Mfcc
from hubert_ray.data.collate import UtteranceReader
from hubert_ray.data.frames import frames_at
from hubert_ray.data.index import Index
from hubert_ray.data.shards import AudioReader, Manifest
from hubert_ray.distributed.shard_map import shard_map
from hubert_ray.errors import RecipeError
from hubert_ray.speech_model import load
from hubert_ray.stages.context import Work, device
from hubert_ray.storage import layout
from hubert_ray.storage.filesystem import Storage
from hubert_ray.units.features import FeatureExtractor, LayerExtractor, MfccExtractor, in_groups


@dataclass(frozen=True)
class Source:
    """What features are taken of. `fingerprint` is that of the model's weights, whichever file they lie in."""

    model: str | None  # a path or URL that every worker can read; None for MFCC
    layer: int
    fingerprint: str
    frame_rate_hz: int
    dim: int

    @classmethod
    def of(cls, model: str, layer: int | None) -> Source:
        """`model` is "mfcc", or what `hubert_ray.load` takes. Raises RecipeError for a layer that is not there."""
        if model == "mfcc":
            if layer is not None:
                raise RecipeError(f"--layer {layer}: MFCC has no layers; leave --layer away, or name a model")
            return cls(None, 0, "mfcc", MfccExtractor.frame_rate_hz, Mfcc().dim)
        place = model if "://" in model else str(Path(model).expanduser().absolute())
        opened = load(place)
        if layer is None or not 0 <= layer <= opened.size.layers:
            raise RecipeError(
                f"--layer: found {layer}, expected one of {model}: 1 to {opened.size.layers}, 0 for their input"
            )
        return cls(place, layer, opened.checkpoint.fingerprint, LayerExtractor.frame_rate_hz, opened.size.dim)

    def open(self) -> FeatureExtractor:
        """On a worker, its GPU if it has one. Raises RecipeError where another model lies there than on the driver's node."""
        if self.model is None:
            return MfccExtractor()
        opened = load(self.model, device())
        if opened.checkpoint.fingerprint != self.fingerprint:
            raise RecipeError(
                f"{self.model}: found another model on a worker ({opened.checkpoint.fingerprint}) than where the command was typed "
                f"({self.fingerprint}); give a folder that all nodes share, or a URL"
            )
        return LayerExtractor(opened.encoder, self.layer)


class _Writer:
    """Writes the features of one shard, ten minutes of audio at a time."""

    def __init__(self, storage: Storage, corpus: str, folder: str, source: Source, dtype: str):
        self._storage, self._corpus, self._folder = storage, corpus, folder
        self._reader = AudioReader(storage, corpus)
        self._extractor = source.open()
        self._dtype = np.dtype(dtype)
        width = pa.list_(pa.from_numpy_dtype(self._dtype), self._extractor.dim)
        self._schema = pa.schema(
            {"utterance_id": pa.string(), "features": pa.list_(width), "frame_rate_hz": pa.int16()}
        )

    def __call__(self, shard: str) -> dict[str, Any]:
        manifest = Manifest.read_shard(self._storage, self._corpus, shard)
        ids = manifest.table["utterance_id"].combine_chunks()
        done = frames = 0
        with self._storage.create(f"{self._folder}/{layout.feature_part(shard)}") as file:
            with pa.ipc.new_file(file, self._schema) as table:
                for features in in_groups(self._extractor, UtteranceReader(self._reader, manifest, normalize=False)):
                    table.write_batch(self._batch(ids[done : done + len(features)], features, shard))
                    done += len(features)
                    frames += sum(map(len, features))
        return {"frames": frames}

    def _batch(self, ids: pa.Array, features: list[np.ndarray], shard: str) -> pa.RecordBatch:
        with np.errstate(over="ignore"):  # told below
            flat_N = np.concatenate(features).astype(self._dtype).reshape(-1)
        if not np.isfinite(flat_N).all():
            raise RecipeError(
                f"shard {shard}: features that are no numbers, or beyond what {self._dtype} holds; try --dtype float32"
            )
        frames = pa.FixedSizeListArray.from_arrays(pa.array(flat_N), self._extractor.dim)
        starts = pa.array(np.cumsum([0, *map(len, features)]), pa.int32())
        rate = pa.array(np.full(len(features), self._extractor.frame_rate_hz, dtype=np.int16))
        return pa.record_batch([ids, pa.ListArray.from_arrays(starts, frames), rate], schema=self._schema)


def extract_features(work: Work, source: Source, dtype: str) -> dict[str, Any]:
    """Writes one Arrow file per shard."""
    corpus = work.inputs["corpus"].path
    index = Index.open(work.storage, corpus)
    lengths = (index.numbers("samples")[rows] for _, rows in index.by_shard())
    frames = sum(int(frames_at(samples_N, source.frame_rate_hz).sum()) for samples_N in lengths)
    size = frames * source.dim * np.dtype(dtype).itemsize
    shards = [shard.name for shard in index.shards]
    missing = [shard for shard in shards if not work.storage.exists(work.output.file(layout.feature_part(shard)))]
    print(
        f"{work.name}: {frames:,} frames x {source.dim} x {dtype} = {size:,} bytes in {len(shards)} files, {len(missing)} of them "
        f"still to be written, in {work.storage.full(work.output.path)}",
        flush=True,
    )
    writer = partial(_Writer, work.storage, corpus, work.output.path, source, dtype)
    for row in shard_map(writer, missing, work.cluster):
        print(f"{work.name}  {row['shard']}  {row['frames']} frames", flush=True)
    return {"frames": frames, "dim": source.dim, "bytes": size}
