"""What does a finished run look like on one page?

`render` turns report.json, read into a dict, into a self-contained HTML page: no scripts, no fonts, no images, nothing
fetched. The words and the layout are in `report.html.j2`; this file prepares what the template shows: charts, checks,
numbers written with their units, and word differences. A section whose data is null or absent is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import SequenceMatcher
from functools import cache
from itertools import accumulate
from operator import add
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader, Template
from markupsafe import Markup

from hubert_ray.stages.charts import (
    Axis,
    Bar,
    Level,
    Series,
    Span,
    grouped_bars,
    heat_map,
    is_number,
    line_chart,
    timeline,
)
from hubert_ray.stages.report_numbers import duration, moment, number, percent, percent_tick, short, size, units

COLOUR_OF_START = {"pretrained": "c1", "scratch": "c2"}
WORK_OF_STAGE = {
    "learn_kmeans": ("k-means", "c3"),
    "assign_labels": ("labels", "c4"),
    "pretrain": ("pretraining", "c1"),
    "finetune": ("fine-tuning", "c2"),
    "decode": ("decoding", "c5"),
}
OTHER_WORK = ("data and report", "grey")
LONGEST_IDLE = 1.5  # times the working time; beyond it the run was paused, and a true timeline would be all gap


@dataclass(frozen=True)
class Check:
    """One thing that must hold if the run learned: whether it does, in a few words, and the numbers behind it."""

    passed: bool
    claim: str
    evidence: str


def render(report: Mapping[str, Any]) -> str:
    """The page for one run, as a string of HTML."""
    iterations = report.get("iterations") or []
    return _template().render(
        report=report,
        flow=_flow(report),
        checks=_run_checks(report),
        timeline=_timeline(report.get("stages") or []),
        seconds_worked=sum(stage.get("seconds") or 0 for stage in report.get("stages") or []),
        iterations=[
            {
                "facts": iteration,
                "checks": _iteration_checks(iteration, iterations[index - 1] if index else None),
                "charts": _iteration_charts(iteration),
                "heat_map": _unit_by_phone(iteration),
                "more": _machine_charts(iteration),
            }
            for index, iteration in enumerate(iterations)
        ],
        across_iterations=_across_iterations(iterations),
        trials=_trials(report),
        finetune_charts=_finetune_charts(report),
        error_bars=_error_bars(report),
        examples=_examples(report.get("examples") or []),
        recipe_json=json.dumps(report.get("recipe"), indent=2, ensure_ascii=False),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "duration": duration,
        "size": size,
        "moment": moment,
        "short": short,
        "units": units,
    }
    return environment.get_template("report.html.j2")


def _dig(value: Any, *keys: str) -> Any:
    """`value[key][key]...`, or None as soon as one is missing or null."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


# The headline.


def _flow(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The recipe as steps of (kind, what, how much), in the order in which they ran."""
    steps: list[tuple[str, str, str]] = []
    for iteration in report.get("iterations") or []:
        teacher = str(iteration.get("teacher", ""))
        features = "of MFCC" if teacher == "mfcc" else f"of {teacher}"
        steps.append(("units", f"{units(iteration.get('clusters'))} units", features))
        if count := _dig(iteration, "pretrain", "steps"):
            steps.append(("pretrain", str(iteration.get("name")), f"{number(count)} steps"))
    if report.get("finetune"):
        steps.append(("finetune", "CTC", f"{duration(_dig(report, 'finetune', 'label_seconds'))} of labels"))
    if order := _dig(report, "decode", "ngram_order"):
        steps.append(("decode", f"{order}-gram", "beam search"))
    return steps


def _run_checks(report: Mapping[str, Any]) -> list[Check]:
    """Did pretraining pay: the word errors it removes, for each way to decode."""
    checks = []
    for key, name in (("lm", "with the language model"), ("greedy", "greedy")):
        pretrained, scratch = _dig(report, "wer", key, "pretrained"), _dig(report, "wer", key, "scratch")
        if is_number(pretrained) and is_number(scratch) and scratch > 0:
            change = (scratch - pretrained) / scratch
            words = f"{percent(abs(change), 0)} {'fewer' if change > 0 else 'more'} word errors than from scratch"
            checks.append(Check(change > 0, words, f"{name}: {percent(scratch)} → {percent(pretrained)}"))
    return checks


def _iteration_checks(iteration: Mapping[str, Any], previous: Mapping[str, Any] | None) -> list[Check]:
    checks = []
    entropy, loss = _dig(iteration, "pretrain", "unigram_entropy_bits"), _dig(iteration, "pretrain", "loss_bits_last")
    if is_number(entropy) and is_number(loss):
        side = "below" if loss < entropy else "above"
        claim = f"loss {number(abs(entropy - loss), 2)} bits {side} unigram entropy"
        checks.append(Check(loss < entropy, claim, f"{number(loss, 2)} against {number(entropy, 2)} bits"))
    masked, majority = _dig(iteration, "pretrain", "masked_accuracy"), _dig(iteration, "pretrain", "majority_share")
    if is_number(masked) and is_number(majority) and majority > 0:
        claim = f"masked accuracy {masked / majority:.1f}× the majority share"
        checks.append(Check(masked > majority, claim, f"{percent(masked)} against {percent(majority)}"))
    pnmi, before = _dig(iteration, "quality", "pnmi"), _dig(previous, "quality", "pnmi")
    if previous and is_number(pnmi) and is_number(before):
        claim = f"PNMI of the units {pnmi - before:+.3f}".replace("-", "\N{MINUS SIGN}")
        same = iteration.get("clusters") == previous.get("clusters")
        note = "" if same else f", with {units(previous.get('clusters'))} → {units(iteration.get('clusters'))} units"
        checks.append(Check(pnmi > before, claim, f"{number(before, 3)} → {number(pnmi, 3)}{note}"))
    layers = [layer for layer in iteration.get("layers") or [] if is_number(_dig(layer, "trained", "pnmi"))]
    if layers:
        best = max(layers, key=lambda layer: layer["trained"]["pnmi"])
        after = best["trained"]["pnmi"]
        untrained = [_dig(layer, "untrained", "pnmi") for layer in layers]
        start = max((value for value in untrained if is_number(value)), default=None)
        if start is not None:
            claim = f"best layer {after - start:+.3f} PNMI over untrained".replace("-", "\N{MINUS SIGN}")
            evidence = f"layer {best['layer']}: {number(after, 3)}; best untrained layer {number(start, 3)}"
            checks.append(Check(after > start, claim, evidence))
    return checks


# The sections.


def _timeline(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The Gantt chart, and whether idle time had to be cut out of it."""
    begun = [datetime.fromisoformat(stage["started"]).timestamp() for stage in stages if stage.get("started")]
    lengths = [stage["seconds"] if is_number(stage.get("seconds")) else 0.0 for stage in stages]
    starts = [begin - min(begun) for begin in begun]
    end_to_end = len(starts) < len(stages) or max(map(add, starts, lengths), default=0) > LONGEST_IDLE * sum(lengths)
    if end_to_end:
        starts = list(accumulate(lengths, initial=0.0))[:-1]
    spans, keys = [], {}
    for stage, start, length in zip(stages, starts, lengths, strict=True):
        # `iter1/pretrain`, `finetune/scratch`, `decode`: the kind of a stage is one part of its name.
        kinds = [part for part in str(stage.get("name")).split("/") if part in WORK_OF_STAGE]
        work, colour = WORK_OF_STAGE[kinds[-1]] if kinds else OTHER_WORK
        keys[work] = colour
        spans.append(Span(str(stage.get("name")), start, length, colour, hollow=bool(stage.get("skipped"))))
    label = "working time" if end_to_end else "time since the run began"
    chart = timeline("Stages in time", spans, list(keys.items()), Axis(label, duration, duration))
    return {"chart": chart, "end_to_end": end_to_end}


def _curve(points: Iterable[Mapping[str, Any]] | None, y: str, x: str = "step") -> list[tuple[Any, Any]]:
    return [(point.get(x), point.get(y)) for point in points or []]


def _iteration_charts(iteration: Mapping[str, Any]) -> list[Markup]:
    pretrain, layers = iteration.get("pretrain") or {}, iteration.get("layers") or []
    steps, curve = Axis("step", number, short, whole_numbers=True), pretrain.get("curve")
    share = Axis("share of frames predicted right", percent, percent_tick, from_zero=True)
    pnmi = {
        kind: [(layer.get("layer"), _dig(layer, kind, "pnmi")) for layer in layers] for kind in ("trained", "untrained")
    }
    inertia = [
        (name, list(enumerate(_dig(stream, "codebook", "inertia_history") or [], start=1)))
        for name, stream in _streams(iteration)
    ]
    charts = [
        line_chart(
            "Loss against unigram entropy",
            [Series("masked-frame loss", _curve(curve, "loss_bits"))],
            steps,
            Axis("bits per masked frame", lambda value: number(float(value), 2)),
            [Level("unigram entropy", pretrain.get("unigram_entropy_bits"))],
        ),
        line_chart(
            "Accuracy on masked and unmasked frames",
            [
                Series("masked", _curve(curve, "masked_accuracy")),
                Series("unmasked", _curve(curve, "unmasked_accuracy"), "c3"),
            ],
            steps,
            share,
            [Level("majority share", pretrain.get("majority_share"))],
        ),
        line_chart(
            "Phone information by layer",
            [
                Series("trained", pnmi["trained"], dots=True),
                Series("untrained", pnmi["untrained"], "grey", dots=True),
            ],
            Axis("layer", whole_numbers=True),
            Axis("PNMI of k-means units", lambda value: number(float(value), 2), from_zero=True),
        ),
        line_chart(
            "Inertia of k-means",
            [
                Series(name or "inertia", points, f"c{(number + 2) % 5 + 1}", dots=True)
                for number, (name, points) in enumerate(inertia)
            ],
            Axis("iteration of k-means", whole_numbers=True),
            Axis("squared distance to the centroid", "{:,.4g}".format, short),
        ),
    ]
    return [chart for chart in charts if chart]


def _machine_charts(iteration: Mapping[str, Any]) -> list[Markup]:
    """What a person who runs the cluster looks at: learning rate and throughput."""
    curve, steps = _dig(iteration, "pretrain", "curve"), Axis("step", number, short, whole_numbers=True)
    rate = Series("learning rate", _curve(curve, "lr"), "c4")
    speed = Series("throughput", _curve(curve, "audio_seconds_per_second"), "c5")
    rate_axis = Axis("learning rate", lambda value: f"{value:.3g}", from_zero=True)
    charts = [
        line_chart("Learning rate", [rate], steps, rate_axis),
        line_chart("Throughput", [speed], steps, Axis("seconds of audio per second", number, from_zero=True)),
    ]
    return [chart for chart in charts if chart]


def _streams(iteration: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, what it has) of each label stream; the only one of a plain codebook has no name, and is the iteration itself."""
    streams = iteration.get("streams")
    return (
        [(f"stream {place}", stream) for place, stream in enumerate(streams, start=1)] if streams else [("", iteration)]
    )


def _unit_by_phone(iteration: Mapping[str, Any]) -> Markup:
    maps = Markup("")
    for name, stream in _streams(iteration):
        if table := stream.get("unit_by_phone"):
            title = "Which phone a unit stands for" + (f", {name}" if name else "")
            maps += heat_map(title, table["phones"], table["units"], table["share"])
    return maps


def _across_iterations(iterations: Sequence[Mapping[str, Any]]) -> Markup:
    measures = (
        ("PNMI", "pnmi", "c1"),
        ("phone purity", "phone_purity", "c3"),
        ("cluster purity", "cluster_purity", "c5"),
    )
    groups = [
        (
            f"{iteration.get('name')}, {units(iteration.get('clusters'))}",
            [Bar(name, _dig(iteration, "quality", key), colour) for name, key, colour in measures],
        )
        for iteration in iterations
    ]
    return grouped_bars("Units of each iteration", groups, Axis("0 to 1", lambda value: number(float(value), 2)))


def _trials(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All trials of the sweep, best first, each told whether it is the best of its start."""
    best = {(start, trial.get("id")) for start, trial in (_dig(report, "finetune", "best") or {}).items() if trial}
    trials = [
        {**trial, "is_best": (trial.get("start"), trial.get("id")) in best}
        for trial in _dig(report, "finetune", "trials") or []
    ]
    return sorted(trials, key=lambda trial: trial["dev_wer"] if is_number(trial.get("dev_wer")) else float("inf"))


def _finetune_charts(report: Mapping[str, Any]) -> list[Markup]:
    lines = [
        Series(
            f"{trial.get('start')} {trial.get('id')}",
            _curve(trial.get("curve"), "dev_wer"),
            COLOUR_OF_START.get(str(trial.get("start")), "c3"),
            faint=not trial["is_best"],
        )
        for trial in _trials(report)
    ]
    axis = Axis("word error rate", percent, percent_tick, from_zero=True)
    chart = line_chart("Word error rate on dev", lines, Axis("step", number, short, whole_numbers=True), axis)
    return [chart] if chart else []


def _error_bars(report: Mapping[str, Any]) -> list[Markup]:
    charts = []
    for title, key in (("Word error rate", "wer"), ("Character error rate", "cer")):
        groups = [
            (name, [Bar(start, _dig(report, key, way, start), colour) for start, colour in COLOUR_OF_START.items()])
            for way, name in (("greedy", "greedy"), ("lm", "language model"))
        ]
        charts.append(grouped_bars(title, groups, Axis(f"{title.lower()}, lower is better", percent, percent_tick)))
    return [chart for chart in charts if chart]


def _examples(examples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "utterance_id": example.get("utterance_id"),
            "reference": example.get("reference"),
            "hypotheses": [
                (name, word_differences(example.get("reference") or "", text))
                for name, text in (example.get("hypotheses") or {}).items()
                if text is not None
            ],
        }
        for example in examples
    ]


def word_differences(reference: str, hypothesis: str) -> list[tuple[str, str, str]]:
    """The hypothesis in runs of (kind, words, words of the reference); kind: equal, replace, delete or insert."""
    expected, heard = reference.split(), hypothesis.split()
    return [
        (kind, " ".join(heard[c:d]), " ".join(expected[a:b]))
        for kind, a, b, c, d in SequenceMatcher(None, expected, heard, autojunk=False).get_opcodes()
    ]
