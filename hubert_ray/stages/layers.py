"""Which layer of which model should teach next, and with how many clusters? The layout of HuBERT's Fig. 2, and a choice.

Every layer of the models x several numbers of clusters: PNMI, phone purity and cluster purity of units fitted on train audio
(stages/unit_study.py); and a choice. The score is PNMI where there are phones, else the predictability of the labels
(units/quality.py argues it). PNMI grows with K until each frame has its own cluster, and so, as far as was seen, does
predictability; hence K is the smallest at which a layer reaches 95 % of the best score, and the layer is the best at that K.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import msgspec
import numpy as np

from hubert_ray.stages.charts import Axis, Series, draw_lines
from hubert_ray.stages.context import Work, model_at
from hubert_ray.stages.unit_study import (
    COLOURS,
    Cell,
    Facts,
    check_hours,
    layer_features,
    markdown_table,
    measure,
    measure_abx,
    write_study,
)
from hubert_ray.units.quality import rank_correlation

ENOUGH = 0.95  # of the best score
FIGURES = {
    "pnmi": "PNMI",
    "phone_purity": "Phone purity",
    "cluster_purity": "Cluster purity",
    "predictability": "Predictability",
    "abx": "ABX error",
}


def layers(work: Work, clusters: Sequence[int], hours: float, seeds: int, abx: bool) -> None:
    """Writes `layers.json`, `layers.md` and `layers.svg`, and prints the choice as a setting to paste. Raises RecipeError where
    there is less train audio, or no fastabx for `abx`."""
    check_hours(work, hours)
    features = {
        (model, layer): layer_features(work, model, layer)
        for model in [name for name in work.inputs if name != "corpus"]
        for layer in range(model_at(work.inputs[model]).card().size.layers + 1)
    }
    errors = measure_abx(work, list(features.values()), 3600 * hours) if abx else {}
    cells = {
        (*place, k): [Cell(of, k, 3600 * hours, 3600 * hours, seed) for seed in range(seeds)]
        for (place, of), k in product(features.items(), clusters)
    }
    found = measure(work, [cell for same in cells.values() for cell in same])
    rows = [
        {"model": model, "layer": layer, "clusters": k, "abx": errors.get(features[model, layer])}
        | _mean([found[cell] for cell in same])
        for (model, layer, k), same in cells.items()
    ]
    figures = [name for name in FIGURES if rows[0][name] is not None]
    chosen = choose(rows)
    setting = f'teacher = {{kind = "layer", of = "{chosen["model"]}", layer = {chosen["layer"]}}}'
    said = (
        f"Choice: layer {chosen['layer']} of {chosen['model']}, K = {chosen['clusters']}, by {FIGURES[figures[0]]} "
        f"{chosen[figures[0]]:.3f}:\n\n    {setting}\n    kmeans = {{clusters = {chosen['clusters']}}}\n"
    )
    agreement = _agreement(rows)
    if agreement is not None:
        said += (
            f"\nPredictability, which would choose if there were no phones, ranks these {len(rows)} points as PNMI does with a "
            f"Spearman correlation of {agreement:.2f}.\n"
        )
    text = f"# Layers: {work.recipe.corpus.name}, k-means on {hours:g} h, {seeds} seed{'s' if seeds > 1 else ''}\n\n"
    text += _table(rows, figures) + "\n" + said
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(f"{row['model']}, K = {row['clusters']}", []).append(row)
    drawings = [
        draw_lines(
            FIGURES[name],
            [
                Series(line, [(row["layer"], row[name]) for row in of_line], COLOURS[n % len(COLOURS)], dots=True)
                for n, (line, of_line) in enumerate(lines.items())
            ],
            Axis("layer", whole_numbers=True),
            Axis(FIGURES[name], "{:.3f}".format),
        )
        for name in figures
    ]
    facts = {"hours": hours, "seeds": seeds, "rows": rows, "choice": chosen, "rank_correlation": agreement}
    write_study(work, facts, text, drawings)


def choose(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row to take the next teacher from: of those whose score is at least `ENOUGH` of the best, those with the fewest
    clusters, and of these the best."""
    score = "pnmi" if rows[0]["pnmi"] is not None else "predictability"
    best = max(row[score] for row in rows)
    enough = [
        row for row in rows if row[score] >= min(best, ENOUGH * best)
    ]  # predictability may be below zero by chance
    fewest = min(row["clusters"] for row in enough)
    return max((row for row in enough if row["clusters"] == fewest), key=lambda row: row[score])


def _mean(facts: Sequence[Facts]) -> dict[str, Any]:
    """Of the cells that differ by their seed only."""
    qualities = [msgspec.structs.asdict(f.quality) for f in facts if f.quality]
    figures = {
        name: float(np.mean([quality[name] for quality in qualities])) if qualities else None
        for name in ("pnmi", "phone_purity", "cluster_purity")
    }
    return figures | {"predictability": float(np.mean([f.predictability for f in facts]))}


def _agreement(rows: Sequence[dict[str, Any]]) -> float | None:
    """How far the choice by labels alone could be trusted here; None where nothing tells, or there is too little to rank."""
    if rows[0]["pnmi"] is None or len(rows) < 3:
        return None
    return rank_correlation([row["predictability"] for row in rows], [row["pnmi"] for row in rows])


def _table(rows: Sequence[dict[str, Any]], figures: Sequence[str]) -> str:
    lines = [
        [row["model"], str(row["layer"]), str(row["clusters"]), *(f"{row[name]:.3f}" for name in figures)]
        for row in rows
    ]
    return markdown_table(["model", "layer", "K", *(FIGURES[name] for name in figures)], lines)
