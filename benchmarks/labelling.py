"""How fast are labels assigned, against the rate of the teacher's forward pass alone; and how much memory does it take?

    python -m benchmarks.labelling                                             TINY and Base, made-up FLAC
    python -m benchmarks.labelling --audio /data/LibriSpeech --json            real FLAC files, with peak memory at three sizes

`forward` is the teacher's layer on waveforms that are in memory already, one utterance at a time as in labelling. `labelling` is
what a worker of `assign_labels` does with a shard: manifest, ranged reads, decoding, features, the nearest of 500 centroids, the
label part written. Weights are random, torch has one thread, both take turns and figures are medians. Reading ahead uses a second
processor where one is idle, so `share` is given by the clock and by processor seconds, of which a busy machine has no more.

Peak memory is that of a fresh process that labels a corpus of the given hours. What it computes with is freed after each
utterance; the next one is as long as none before it, and leaves holes in the allocator's memory until there are enough of them:
on two hours of LibriSpeech the peak comes to 1.5 GiB, and there it stays.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import safetensors.torch
import torch

from benchmarks.loader import CORPUS, as_a_worker, recordings, store
from hubert_ray.config.recipe import Layer
from hubert_ray.config.sizes import SIZES
from hubert_ray.data.collate import UtteranceReader
from hubert_ray.data.frames import SAMPLE_RATE
from hubert_ray.data.shards import AudioReader, Manifest
from hubert_ray.formats.native import ModelCard
from hubert_ray.model.hubert import Encoder
from hubert_ray.stages.assign_labels import Labeller
from hubert_ray.stages.context import ModelAt, TeacherAt
from hubert_ray.storage import layout
from hubert_ray.storage.filesystem import Storage
from hubert_ray.units.features import GROUP_SECONDS, LayerExtractor
from hubert_ray.units.kmeans import Codebook

CLUSTERS = 500
LAYERS = {"tiny": 3, "base": 9}  # the layer that the paper takes of Base, and three quarters of TINY


def labeller(storage: Storage, name: str) -> Labeller:
    """A worker with a teacher of random weights and random centroids."""
    torch.manual_seed(0)
    encoder = Encoder(SIZES[name])
    path = f"runs/bench/{name}"
    storage.write(f"{path}/{layout.MODEL_CONFIG}", msgspec.json.encode(ModelCard("hubert", SIZES[name])))
    weights = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    storage.write(f"{path}/{layout.MODEL}", safetensors.torch.save(weights))
    teacher = TeacherAt(Layer(of="bench", layer=LAYERS[name]), ModelAt(storage, path))
    centroids_KD = np.random.default_rng(0).standard_normal((CLUSTERS, SIZES[name].dim), dtype=np.float32)
    return Labeller(storage, CORPUS, f"labels/{name}", teacher, Codebook(centroids_KD, (CLUSTERS,)), "cpu")


def measure(storage: Storage, name: str, repeats: int) -> dict:
    """Seconds of audio per second, forward pass and labelling in turns."""
    label = labeller(storage, name)
    encoder = ModelAt(storage, f"runs/bench/{name}").encoder()
    shards = sorted(path.removesuffix(".parquet") for path in storage.list(f"{CORPUS}/{layout.MANIFEST}"))
    inputs: list[list[np.ndarray]] = []
    for shard in shards:
        manifest = Manifest.read_shard(storage, CORPUS, shard)
        utterances = UtteranceReader(AudioReader(storage, CORPUS), manifest, normalize=False)
        inputs += [utterances.waves(rows) for rows in utterances.groups(GROUP_SECONDS)]
    seconds = sum(len(wave_S) for waves in inputs for wave_S in waves) / SAMPLE_RATE
    teacher = LayerExtractor(encoder, LAYERS[name])

    def forward() -> None:
        for waves in inputs:
            teacher(waves)

    def labelling() -> None:
        for shard in shards:
            label(shard)
            storage.delete(f"labels/{name}/{layout.part(shard)}")  # what is there is not labelled again

    clocks: dict[str, list[tuple[float, float]]] = {"forward": [], "labelling": []}
    for _ in range(repeats):
        for way, work in (("forward", forward), ("labelling", labelling)):
            clock, processor = time.perf_counter(), time.process_time()
            work()
            clocks[way].append((time.perf_counter() - clock, time.process_time() - processor))
    pairs = list(zip(clocks["forward"], clocks["labelling"], strict=True))
    return {
        "audio_seconds": round(seconds),
        **{way: round(seconds / statistics.median(c for c, _ in found), 2) for way, found in clocks.items()},
        "share": round(statistics.median(a / b for (a, _), (b, _) in pairs), 3),
        "share_of_processor": round(statistics.median(a / b for (_, a), (_, b) in pairs), 3),
        "shares": [round(a / b, 3) for (a, _), (b, _) in pairs],
    }


def _label_all(folder: str, pipe) -> None:
    """Labels a corpus with TINY in a fresh process; sends the peak of its memory in MiB, before and after."""
    torch.set_num_threads(1)
    storage = Storage(folder)
    label = labeller(storage, "tiny")
    before = _peak_mib()
    for name in storage.list(f"{CORPUS}/{layout.MANIFEST}"):
        label(name.removesuffix(".parquet"))
    pipe.send((before, _peak_mib()))


def _peak_mib() -> float:
    """Of this process; what getrusage tells is handed on to children, by whoever started them."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def memory(options: argparse.Namespace) -> list[dict]:
    """Peak memory of labelling corpora of three sizes."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for hours in map(float, options.memory_hours.split(",")):
        with tempfile.TemporaryDirectory(prefix="hubert-ray-bench-") as folder:
            manifest = store(Storage(folder), recordings(options.audio, hours))
            ours, theirs = context.Pipe()
            process = context.Process(target=_label_all, args=(folder, theirs))
            process.start()
            before, peak = ours.recv()
            process.join()
            found = float(manifest.numbers("samples").sum()) / SAMPLE_RATE / 3600
            rows.append({"hours": round(found, 2), "shards": len(manifest.shards())})
            rows[-1] |= {"model_loaded_mib": round(before), "peak_mib": round(peak)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.labelling", description=__doc__.splitlines()[0])
    parser.add_argument("--audio", type=Path, help="a folder of FLAC files; made-up ones without it")
    parser.add_argument("--minutes", default="tiny=20,base=5", help="of audio for each teacher")
    parser.add_argument("--memory-hours", default="0.5,2,8", help="sizes of corpora whose peak memory is measured")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    as_a_worker()
    torch.set_num_threads(1)
    result: dict = {"clusters": CLUSTERS, "teachers": {}}
    for item in options.minutes.split(","):
        name, _, minutes = item.partition("=")
        with tempfile.TemporaryDirectory(prefix="hubert-ray-bench-") as folder:
            store(Storage(folder), recordings(options.audio, float(minutes) / 60))
            result["teachers"][name] = measure(Storage(folder), name, options.repeats)
    result["memory"] = memory(options)
    if options.json:
        print(json.dumps(result))
        return
    for name, row in result["teachers"].items():
        print(
            f"{name:5} forward {row['forward']:8.2f} x real time   labelling {row['labelling']:8.2f}   share {row['share']:.3f} "
            f"(of processor time {row['share_of_processor']:.3f})"
        )
    for row in result["memory"]:
        print(
            f"{row['hours']:6.2f} h in {row['shards']:3} shards: peak {row['peak_mib']} MiB, {row['model_loaded_mib']} at the start"
        )


if __name__ == "__main__":
    main()
