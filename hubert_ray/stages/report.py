"""everything that was sealed -> report.json and a page to look at.

Reads facts, computes nothing new: each figure is where its stage left it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import torch

from hubert_ray import machine
from hubert_ray.config.recipe import Iteration, Mfcc
from hubert_ray.data.corpora.source import SPLITS
from hubert_ray.data.frames import SAMPLE_RATE
from hubert_ray.data.index import Index
from hubert_ray.distributed import telemetry
from hubert_ray.stages.context import Work
from hubert_ray.stages.decode import SCORES
from hubert_ray.stages.finetune import TRIALS
from hubert_ray.stages.report_page import render
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.artifacts import Artifact, Seal

EXAMPLES = 12


def report(work: Work) -> dict[str, Any]:
    """Writes `report.json` and `report.html`."""
    seals = {name: artifact.require() for name, artifact in work.inputs.items()}
    page = {
        "run": work.recipe.name,
        "recipe": msgspec.to_builtins(work.recipe),
        "fingerprint": work.output.identity.fingerprint,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds_total": sum(seal.facts["seconds"] for seal in seals.values()),
        "versions": machine.versions(),
        "hardware": machine.hardware() | {"gpus": torch.cuda.device_count()},
        "corpus": _corpus(work, work.inputs["prepare_data"], seals["prepare_data"]),
        "stages": [
            {key: seal.facts.get(key) for key in ("seconds", "started", "peak_memory_gib")}
            | {"name": name, "skipped": False}
            for name, seal in seals.items()
        ],
        "iterations": [_iteration(work, seals, iteration) for iteration in work.recipe.iterations],
        **_recogniser(work),
    }
    work.output.write_json("report.json", page)
    work.storage.write(work.output.file("report.html"), render(page).encode())
    return {}


def _corpus(work: Work, corpus: Artifact, seal: Seal) -> dict[str, Any]:
    index = Index.open(work.storage, corpus.path)
    splits = {}
    for name in SPLITS:
        split = index.split(name)
        splits[name] = {
            "utterances": len(split),
            "hours": int(split.numbers("samples").sum(dtype=np.int64)) / SAMPLE_RATE / 3600,
            "speakers": index.contents.speakers.get(name, 0),
            "transcribed": sum(shard.transcribed for shard in split.shards),
            "aligned": sum(shard.aligned for shard in split.shards),
        }
    reasons = schemas.decode(corpus.read(layout.QUARANTINE))["reason"].value_counts().to_pylist()
    return {
        "name": work.recipe.corpus.name,
        "splits": splits,
        "quarantined": [{"reason": row["values"], "count": row["counts"]} for row in reasons],
        "shards": seal.facts["shards"],
        "bytes": index.audio_bytes(),
    }


def _iteration(work: Work, seals: dict[str, Seal], iteration: Iteration) -> dict[str, Any]:
    name, teacher = iteration.name, iteration.teacher
    labels = work.inputs[f"{name}/assign_labels"].read_json(layout.QUALITY)
    codebook = work.inputs[f"{name}/learn_kmeans"].read_json(layout.HISTORY)
    streams = [
        {"clusters": clusters, "unit_by_phone": _unit_by_phone(labels, stream)}
        | {"codebook": fitted | {"frames": codebook["frames"]}}
        | {figure: stream[figure] for figure in ("quality", "unigram_entropy_bits", "majority_share")}
        for clusters, fitted, stream in zip(
            iteration.kmeans.classes, codebook["streams"], labels["streams"], strict=True
        )
    ]
    trained = seals[f"{name}/pretrain"].facts
    curve = telemetry.read(work.storage, work.inputs[f"{name}/pretrain"].path)
    figures = (
        "steps", "parameters", "loss_bits_first", "loss_bits_last", "masked_accuracy", "unmasked_accuracy",
        "audio_seconds_per_second",
    )  # fmt: skip
    return {
        "name": name,
        "teacher": "mfcc" if isinstance(teacher, Mfcc) else f"{teacher.of} layer {teacher.layer}",
        # Several streams have a table each; what stands outside of `streams` is then their mean.
        **(
            {part: streams[0][part] for part in ("codebook", "unit_by_phone")}
            if len(streams) == 1
            else {"streams": streams}
        ),
        "clusters": iteration.kmeans.clusters,
        "frame_rate_hz": teacher.frame_rate_hz,
        "quality": labels["quality"],
        "quality_measured_on": labels["measured_on"],
        "layers": work.inputs[f"{name}/measure_layers"].read_json(layout.QUALITY) or None,
        "pretrain": {figure: trained[figure] for figure in figures}
        | {figure: labels[figure] for figure in ("unigram_entropy_bits", "majority_share")}
        | {"curve": curve},
    }


def _unit_by_phone(labels: dict[str, Any], stream: dict[str, Any]) -> dict[str, Any] | None:
    """P(phone | unit) of the units that occur, ordered by their commonest phone."""
    if not stream["quality"]:
        return None
    counts_PK = np.array(stream["phone_counts"])
    units = [int(unit) for unit in np.flatnonzero(counts_PK.sum(axis=0))]
    units.sort(key=lambda unit: (counts_PK[:, unit].argmax(), -counts_PK[:, unit].max() / counts_PK[:, unit].sum()))
    share_UP = (counts_PK[:, units] / counts_PK[:, units].sum(axis=0)).T
    return {"phones": labels["phones"], "units": units, "share": share_UP.round(3).tolist()}


def _recogniser(work: Work) -> dict[str, Any]:
    tables = {
        name.removeprefix("finetune/"): artifact.read_json(TRIALS)
        for name, artifact in work.inputs.items()
        if name.startswith("finetune/")
    }
    if not tables:
        return {"finetune": None, "decode": None, "wer": None, "cer": None, "examples": []}
    assert work.recipe.finetune
    finetune = {
        "label_seconds": work.recipe.finetune.label_seconds,
        "trials": [trial for table in tables.values() for trial in table["trials"]],
        "best": {start: table["best"] for start, table in tables.items()},
    }
    if "decode" not in work.inputs:
        return {"finetune": finetune, "decode": None, "wer": None, "cer": None, "examples": []}
    decoded = work.inputs["decode"]
    scores = decoded.read_json(SCORES)
    chosen = ("lm_weight", "word_score", "ngram_order", "lm_perplexity_dev")
    return {
        "finetune": finetune,
        "decode": {key: scores[key] for key in chosen} | {"split": "test"},
        "wer": scores["wer"],
        "cer": scores["cer"],
        "examples": _examples(decoded),
    }


def _examples(decoded: Artifact) -> list[dict[str, Any]]:
    """The first test utterances by name, as each system heard them."""
    found: dict[str, dict[str, Any]] = {}
    for part in decoded.storage.list(decoded.file("parts")):
        for row in schemas.decode(decoded.read(f"parts/{part}")).to_pylist():
            entry = found.setdefault(
                row["utterance_id"],
                {"utterance_id": row["utterance_id"], "reference": row["reference"], "hypotheses": {}},
            )
            entry["hypotheses"] |= {f"{row['system']} {mode}": row[mode] for mode in ("greedy", "lm")}
    names = sorted(found)
    return [found[name] for name in names[:: max(1, len(names) // EXAMPLES)][:EXAMPLES]]
