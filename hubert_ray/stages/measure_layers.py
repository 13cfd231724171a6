"""a model -> how well clusters of each of its layers match phones, beside the same network untrained.

The layout of the paper's Fig. 2 at one number of clusters: per layer a codebook is fitted on train audio and scored on aligned dev
audio (stages/unit_study.py). The untrained twin shows what the architecture alone gives. `hubert-ray layers` goes on from here:
several models, several numbers of clusters, and a choice.
"""

from __future__ import annotations

from typing import Any

import msgspec

from hubert_ray.stages.context import Work
from hubert_ray.stages.unit_study import Cell, layer_features, measure
from hubert_ray.storage import layout


def measure_layers(work: Work, layers: int, clusters: int, seconds: float) -> dict[str, Any]:
    """Writes `quality.json`: per layer 0..L the quality of the trained and of an untrained model; none without phones.

    The fact `clusters` says how many there were: fewer than asked for where `seconds` of audio do not suffice.
    """
    if not any(shard.aligned for shard in work.index().shards):
        work.output.write_json(layout.QUALITY, [])
        return {"layers": 0}
    cells = {
        (kind, layer): Cell(layer_features(work, "model", layer, kind == "untrained"), clusters, seconds, seconds)
        for kind in ("trained", "untrained")
        for layer in range(layers + 1)
    }
    found = measure(work, list(cells.values()))
    quality = {place: found[cell].quality for place, cell in cells.items()}
    pnmi = {place: found_there.pnmi for place, found_there in quality.items() if found_there}
    for layer in range(layers + 1):
        compared = f"PNMI {pnmi['trained', layer]:.3f} (untrained {pnmi['untrained', layer]:.3f})"
        print(f"{work.name}  layer {layer}  {compared}", flush=True)
    table = [
        {"layer": layer} | {kind: quality[kind, layer] for kind in ("trained", "untrained")}
        for layer in range(layers + 1)
    ]
    work.output.write_json(layout.QUALITY, msgspec.to_builtins(table))
    return {"layers": layers, "clusters": found[cells["trained", 0]].clusters}
