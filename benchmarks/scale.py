"""What does a corpus of 200 million utterances cost before the first step: seconds and memory of index, plan and labels?

    python -m benchmarks.scale --rows 200000000 --json
    python -m benchmarks.scale --rows 2000000,20000000,200000000          does memory grow with the corpus?

Makes up manifest and label parts (no audio: nothing here opens any), then runs each piece in a process of its own:
    index    write_index over all parts: columns, digest; not the search for repeats, which prepare_data makes before it
    plan     opens the index, plans with HuBERT Base's settings, first step, a step of another epoch (with its shuffle), 1000 steps
    labels   LabelStore over all parts, then windows of utterances drawn at random, each checked
`memory_gib` is the peak of the process's own memory (RssAnon, every 10 ms), `rss_gib` that with the pages of mapped files that
happened to be in memory (VmHWM). Made-up utterances last 2 to 20 s. They have one label a second instead of 50, because
200 million utterances of 11 s have 220 GB of labels; all that grows with the number of utterances is there in full.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hubert_ray.config.recipe import Pretrain
from hubert_ray.data.batching import BatchPlan
from hubert_ray.data.frames import samples_of
from hubert_ray.data.index import Index, write_index
from hubert_ray.data.labels import LabelStore
from hubert_ray.data.shards import WHOLE
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage

CORPUS, LABELS = "corpora/made-up", "labels"
SHARD_ROWS = 25_000
LABEL_RATE_HZ = 1
CLUSTERS = 500
SETTINGS = Pretrain(steps=400_000, peak_lr=5e-4)


def _shards(rows: int) -> list[tuple[str, int]]:
    """(name, utterances)."""
    return [(f"train-{start // SHARD_ROWS:06d}", min(SHARD_ROWS, rows - start)) for start in range(0, rows, SHARD_ROWS)]


def _label_counts(samples: np.ndarray) -> np.ndarray:
    return (samples.astype(np.int64) - 400) // (16_000 // LABEL_RATE_HZ) + 1


def make_parts(storage: Storage, rows: int) -> dict[str, Any]:
    """Manifest and label parts, by as many processes as there are cores."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_make_part, repeat(storage), *zip(*enumerate(_shards(rows)), strict=True), chunksize=16))
    return {}


def _make_part(storage: Storage, number: int, shard_and_count: tuple[str, int]) -> None:
    """The label of second t of row r is (r + t) % 500."""
    shard, count = shard_and_count
    places = pa.array([f"{place:05d}" for place in range(count)])
    samples = np.random.default_rng(number).integers(32_000, 320_000, count)
    size = samples + samples % 977
    columns = {
        "utterance_id": pc.binary_join_element_wise(shard, places, "-"),
        "speaker": pa.array([f"speaker-{number // 10}"]).take(pa.array(np.zeros(count, np.int8))),
        "split": pa.array(["train"]).take(pa.array(np.zeros(count, np.int8))),
        "shard": pa.array([shard]).take(pa.array(np.zeros(count, np.int8))),
        "offset": np.cumsum(size + 1024) - size,
        "size": size,
        "samples": samples,
        "sample_rate_hz": np.full(count, 16_000, np.int32),
    }
    whole = {name: np.full(count, value) for name, value in WHOLE.items()}
    nothing = {
        field.name: pa.nulls(count, field.type)
        for field in schemas.MANIFEST
        if field.name not in columns.keys() | whole.keys()
    }
    table = pa.table(columns | whole | nothing, schema=schemas.MANIFEST)
    _write(storage, f"{CORPUS}/{layout.manifest_part(shard)}", table)
    counts = _label_counts(samples)
    bounds = np.cumsum([0, *counts])
    values = np.repeat(number * SHARD_ROWS + np.arange(count) - bounds[:-1], counts) + np.arange(bounds[-1])
    lists = pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), pa.array((values % CLUSTERS).astype(np.uint16)))
    rates = np.full(count, LABEL_RATE_HZ, np.int16)
    labels = pa.table([table["utterance_id"], lists, rates], schema=schemas.LABELS)
    _write(storage, f"{LABELS}/{layout.part(shard)}", labels)


def _write(storage: Storage, path: str, table: pa.Table) -> None:
    """As schemas.encode, but in half the time: what is written is not what is measured."""
    with storage.create(path) as stream:
        pq.write_table(
            table, stream, compression="zstd", use_dictionary=["speaker", "split", "shard"], write_statistics=False
        )


def make_index(storage: Storage, rows: int) -> dict[str, Any]:
    """The index of all parts."""
    seconds, index = _timed(lambda: write_index(storage, CORPUS, ((name, "train", "") for name, _ in _shards(rows))))
    assert len(index) == rows
    return {"seconds": seconds}


def make_plan(storage: Storage, rows: int) -> dict[str, Any]:
    """The plan, and steps near and far, which are checked."""
    open_seconds, index = _timed(lambda: Index.open(storage, CORPUS))
    samples = index.numbers("samples")
    plan_seconds, plan = _timed(lambda: BatchPlan(samples, SETTINGS, index.by_part()))
    first_seconds, _ = _timed(lambda: plan.step(0))
    far_seconds, _ = _timed(lambda: plan.step(3 * plan.steps_per_epoch + plan.steps_per_epoch // 2))
    beginning = plan.steps_per_epoch
    many = min(1000, plan.steps_per_epoch)
    many_seconds, steps = _timed(lambda: [plan.step(beginning + step) for step in range(many)])
    micro_batches = [micro_batch for step in steps for micro_batch in step]
    for micro_batch in micro_batches:
        assert (samples[micro_batch.rows] >= micro_batch.starts + samples_of(micro_batch.frames)).all()
    drawn = np.concatenate([micro_batch.rows for micro_batch in micro_batches])
    assert many == plan.steps_per_epoch or len(np.unique(drawn)) == len(drawn), "an utterance twice in an epoch"
    return {
        "open_seconds": open_seconds,
        "plan_seconds": plan_seconds,
        "first_step_seconds": first_seconds,
        "far_step_seconds": far_seconds,
        "steps_per_second": round(many / many_seconds, 1),
        "steps_per_epoch": plan.steps_per_epoch,
    }


def make_labels(storage: Storage, rows: int) -> dict[str, Any]:
    """The labels' file, and windows of it, which are checked."""
    index = Index.open(storage, CORPUS)
    seconds, store = _timed(lambda: LabelStore(storage, CORPUS, LABELS, index, LABEL_RATE_HZ))
    drawn = np.random.default_rng(1).integers(0, rows, 10_000).tolist()
    window_seconds, windows = _timed(lambda: [store.window(row, slice(None)) for row in drawn])
    for row, labels in zip(drawn, windows, strict=True):
        expected = (row + np.arange(int(_label_counts(index.numbers("samples")[row : row + 1])[0]))) % CLUSTERS
        assert np.array_equal(labels[:, 0], expected), f"row {row}"
    labels_bytes = 2 * int(sum(_label_counts(index.numbers("samples")[rows]).sum() for _, rows in index.by_shard()))
    return {
        "seconds": seconds,
        "window_microseconds": round(1e6 * window_seconds / len(drawn), 1),
        "file_gb": round(labels_bytes / 1e9, 3),
    }


PIECES = {"parts": make_parts, "index": make_index, "plan": make_plan, "labels": make_labels}


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = work()
    return round(time.perf_counter() - begun, 4), result


class _OwnMemory:
    """Peak memory of this process while the block runs, GiB: its own, and with mapped files."""

    def __enter__(self) -> _OwnMemory:
        self.own, self._ended = _status("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.own, self.resident = max(self.own, _status("RssAnon")), _status("VmHWM")

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self.own = max(self.own, _status("RssAnon"))


def _status(name: str) -> float:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 2**20


def _gb(folder: Path) -> float:
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9, 3)


def measure(rows: int, parent: Path | None) -> dict[str, Any]:
    """Every figure of one size, each piece in a process of its own."""
    result: dict[str, Any] = {"rows": rows}
    with tempfile.TemporaryDirectory(prefix="hubert-ray-scale-", dir=parent) as folder:
        for piece in PIECES:
            command = [
                sys.executable,
                "-m",
                "benchmarks.scale",
                "--piece",
                piece,
                "--rows",
                str(rows),
                "--folder",
                folder,
            ]
            result[piece] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        disk = {
            "manifest_parts": f"{CORPUS}/{layout.MANIFEST}",
            "index": f"{CORPUS}/{layout.INDEX_FOLDER}",
            "label_parts": LABELS,
        }
        result["disk_gb"] = {name: _gb(Path(folder) / place) for name, place in disk.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="2000000,20000000", help="utterances; several sizes with commas")
    parser.add_argument("--folder", type=Path, help="where the files of the measurement lie meanwhile")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--piece", choices=PIECES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = [int(size) for size in options.rows.split(",")]
    if min(sizes) < 1000:
        parser.error("expected --rows from 1000")
    if options.piece:
        with _OwnMemory() as memory:
            found = PIECES[options.piece](Storage(str(options.folder)), sizes[0])
        print(json.dumps(found | {"memory_gib": round(memory.own, 3), "rss_gib": round(memory.resident, 3)}))
        return
    results = [measure(rows, options.folder) for rows in sizes]
    if options.json:
        print(json.dumps({"runs": results}))
        return
    for result in results:
        print(f"{result['rows']} utterances, on disk (GB): {result['disk_gb']}")
        for piece in ("index", "plan", "labels"):
            print(f"  {piece:8}" + "   ".join(f"{name} {value}" for name, value in result[piece].items()))


if __name__ == "__main__":
    main()
