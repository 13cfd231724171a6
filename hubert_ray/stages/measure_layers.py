"""a model -> how well clusters of each of its layers match phones, beside the same network untrained.

The layout of the paper's Fig. 2: per layer a codebook is fitted on train audio and scored on aligned dev audio. The
untrained twin shows what the architecture alone gives. Layers are spread over Ray Data workers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
import numpy as np
import pyarrow.compute as pc

from hubert_ray.data.collate import UtteranceReader
from hubert_ray.data.frames import SAMPLE_RATE
from hubert_ray.data.shards import AudioReader, Manifest
from hubert_ray.distributed.shard_map import shard_map
from hubert_ray.stages.context import ModelAt, Work, model_at
from hubert_ray.storage import layout
from hubert_ray.units import kmeans
from hubert_ray.units.features import LayerExtractor
from hubert_ray.units.quality import PhoneCounts

PASSES = 15
SEED = 0
FRAMES_PER_CLUSTER = 10  # at least: of so little audio, more clusters than that would only learn it by heart


class _LayerScore:
    """Scores one (model, layer), named `trained/3` or `untrained/3`."""

    def __init__(self, model: ModelAt, corpus: str, clusters: int, seconds: float):
        self._model, self._clusters = model, clusters
        whole = Manifest.read(model.storage, corpus)
        train = whole.split("train")
        aligned = whole.where(pc.is_valid(whole.table["phones"]))
        dev = aligned.split("dev")
        reader = AudioReader(model.storage, corpus)
        self._fit_on = _draw(reader, train, seconds)[0]
        self._waves, self._phones = _draw(reader, dev if len(dev) else aligned, seconds)

    def __call__(self, key: str) -> dict[str, Any]:
        kind, layer = key.split("/")
        encoder = self._model.encoder() if kind == "trained" else self._model.untrained(SEED)
        extract = LayerExtractor(encoder, int(layer))
        centroids_KD = _fit(np.concatenate(extract(self._fit_on)), self._clusters)
        counts = PhoneCounts(len(centroids_KD))
        for frames_FD, phones in zip(extract(self._waves), self._phones, strict=True):
            counts.add(phones, kmeans.assign(frames_FD, centroids_KD)[0], extract.frame_rate_hz)
        quality = counts.quality()
        assert quality is not None
        return {"quality": msgspec.to_builtins(quality), "clusters": len(centroids_KD)}


def _draw(reader: AudioReader, manifest: Manifest, seconds: float) -> tuple[list[np.ndarray], list]:
    """Waveforms and phones of utterances drawn by seed until `seconds` of audio are full."""
    order = np.random.default_rng(SEED).permutation(len(manifest))
    ends = np.cumsum(manifest.numbers("samples")[order])
    rows = np.sort(order[: int(np.searchsorted(ends, seconds * SAMPLE_RATE)) + 1]).tolist()
    utterances = UtteranceReader(reader, manifest, normalize=False)
    return utterances.waves(rows), manifest.table["phones"].take(rows).to_pylist()


def _fit(frames_ND: np.ndarray, clusters: int) -> np.ndarray:
    """Centroids (K, D); K is `clusters`, or as many as the frames suffice for."""
    rng = np.random.default_rng(SEED)
    clusters = max(1, min(clusters, len(frames_ND) // FRAMES_PER_CLUSTER))
    seeding = rng.permutation(len(frames_ND))[: max(10_000, 30 * clusters)]
    centroids_KD = kmeans.seed(frames_ND[seeding], clusters, 1, rng)
    for _ in range(PASSES):
        centroids_KD = kmeans.update(kmeans.partial(frames_ND, centroids_KD), centroids_KD)
    return centroids_KD


def measure_layers(work: Work, layers: int, clusters: int, seconds: float) -> dict[str, Any]:
    """Writes `quality.json`: per layer 0..L the quality of the trained and of an untrained model; none without phones.

    The fact `clusters` says how many there were: fewer than asked for where `seconds` of audio do not suffice.
    """
    if not pc.any(pc.is_valid(work.manifest().table["phones"])).as_py():
        work.output.write_json(layout.QUALITY, [])
        return {"layers": 0}
    keys = [f"{kind}/{layer}" for kind in ("trained", "untrained") for layer in range(layers + 1)]
    score = partial(_LayerScore, model_at(work.inputs["model"]), work.inputs["corpus"].path, clusters, seconds)
    found = {row["shard"]: row for row in shard_map(score, keys, work.cluster)}
    table = [
        {"layer": layer} | {kind: found[f"{kind}/{layer}"]["quality"] for kind in ("trained", "untrained")}
        for layer in range(layers + 1)
    ]
    for row in table:
        pnmi = {kind: row[kind]["pnmi"] for kind in ("trained", "untrained")}
        print(
            f"{work.name}  layer {row['layer']}  PNMI {pnmi['trained']:.3f} (untrained {pnmi['untrained']:.3f})",
            flush=True,
        )
    work.output.write_json(layout.QUALITY, table)
    return {"layers": layers, "clusters": found["trained/0"]["clusters"]}
