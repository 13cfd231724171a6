"""How much do k-means units depend on chance and on the amount of audio? The layout of HuBERT's Table IV.

features x clusters x hours, several seeds each: mean and standard deviation (over seeds, n - 1) of the PNMI and of the inertia. A
seed draws the audio from the largest amount asked for, and the starting centroids; at the largest amount all seeds hear the same
audio, so that its deviation is that of the start alone. Without phones there is the predictability of the labels in place of PNMI.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from hubert_ray.config.recipe import Layer, Teacher
from hubert_ray.stages.charts import Axis, Series, draw_lines
from hubert_ray.stages.context import Work
from hubert_ray.stages.unit_study import (
    COLOURS,
    Cell,
    Facts,
    check_hours,
    layer_features,
    markdown_table,
    measure,
    mfcc_features,
    write_study,
)

FIGURES = {
    "pnmi": "PNMI",
    "predictability": "Predictability of the labels",
    "inertia": "Inertia, mean squared distance",
}


def stability(
    work: Work, features: Sequence[Teacher], clusters: Sequence[int], hours: Sequence[float], seeds: int
) -> None:
    """Writes `stability.json`, `stability.md` and `stability.svg`. Raises RecipeError where there is less train audio."""
    check_hours(work, max(hours))
    columns = [layer_features(work, f.of, f.layer) if isinstance(f, Layer) else mfcc_features(f) for f in features]
    groups = {
        (column.name, k, h): [Cell(column, k, 3600 * h, 3600 * max(hours), seed) for seed in range(seeds)]
        for column, k, h in product(columns, clusters, sorted(hours))
    }
    found = measure(work, [cell for cells in groups.values() for cell in cells])
    rows = [
        {"features": name, "clusters": k, "hours": h} | _figures([found[cell] for cell in cells])
        for (name, k, h), cells in groups.items()
    ]
    shown = ["pnmi" if rows[0]["pnmi"] else "predictability", "inertia"]
    text = f"# Stability of k-means units: {work.recipe.corpus.name}, {seeds} seeds\n"
    text += "".join(f"\n{FIGURES[figure]}: mean ± standard deviation\n\n{_table(rows, figure)}" for figure in shown)
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(f"{row['features']}, K = {row['clusters']}", []).append(row)
    drawings = [
        draw_lines(
            f"{FIGURES[figure]}, mean over {seeds} seeds",
            [
                Series(
                    name, [(row["hours"], row[figure]["mean"]) for row in line], COLOURS[n % len(COLOURS)], dots=True
                )
                for n, (name, line) in enumerate(lines.items())
            ],
            Axis("hours of audio fitted on"),
            Axis(FIGURES[figure], "{:.4g}".format),
        )
        for figure in shown
    ]
    write_study(work, {"seeds": seeds, "rows": rows}, text, drawings)


def _figures(facts: Sequence[Facts]) -> dict[str, Any]:
    """Of the cells that differ by their seed only."""
    values = {
        "pnmi": [f.quality.pnmi for f in facts if f.quality],
        "predictability": [f.predictability for f in facts],
        "inertia": [f.inertia for f in facts],
    }
    return {
        name: {"mean": float(np.mean(v)), "std": float(np.std(v, ddof=min(1, len(v) - 1))), "values": v} if v else None
        for name, v in values.items()
    }


def _table(rows: list[dict[str, Any]], figure: str) -> str:
    """features x K down, hours across."""
    cell = {(row["features"], row["clusters"], row["hours"]): row[figure] for row in rows}
    hours = sorted({row["hours"] for row in rows})
    digits = 4 if max(row[figure]["mean"] for row in rows) < 1 else 2
    lines = [
        [
            name,
            f"{k}",
            *(f"{cell[name, k, h]['mean']:.{digits}f} ± {cell[name, k, h]['std']:.{digits}f}" for h in hours),
        ]
        for name, k in dict.fromkeys((row["features"], row["clusters"]) for row in rows)
    ]
    return markdown_table(["features", "K", *(f"{h:g} h" for h in hours)], lines)
