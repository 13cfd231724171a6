"""How fast do batches of crops come off storage, against the rate at which soundfile decodes the same files from memory?

    python -m benchmarks.loader                                                made-up speech-like FLAC, on the local disk and S3
    python -m benchmarks.loader --audio /data/LibriSpeech --json               real FLAC files
    python -m benchmarks.loader --latency 0.1                                  an S3 API that answers 100 ms late

`raw` is one thread that decodes the utterances of one epoch, in the plan's order, from bytes in memory: soundfile and nothing else.
`ours` is the whole way of the same utterances: plan, ranged reads, decoding, crops with their labels, collated micro-batches, read
ahead as training reads them (PREFETCH micro-batches), with one processor to decode on and the shards open. Rates are seconds of
decoded audio per second; all take turns, figures are medians. Crops are Base's, so about a tenth of what is decoded is cut away.

S3 is a process that answers HEAD and ranged GET as S3 does, --latency late; tests ask a whole S3 API (moto) instead, which takes
35 ms of processor time for a range and would be all that is measured. `s3_fetch` is our readers without decoding,
`s3_one_at_a_time` one range after the other on a share of the utterances, `s3_cached` an epoch after the one that filled the cache
on local disk.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, cycle
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import soundfile

from hubert_ray.config.recipe import Pretrain
from hubert_ray.data.batching import BatchPlan, MicroBatch
from hubert_ray.data.collate import UtteranceReader
from hubert_ray.data.frames import SAMPLE_RATE, frames_of
from hubert_ray.data.index import write_index
from hubert_ray.data.labels import LabelStore
from hubert_ray.data.loader import FETCHES, ahead
from hubert_ray.data.shards import AudioReader, Manifest, RawUtterance, write_shard
from hubert_ray.distributed.train_loop import PREFETCH
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.cache import RangeCache
from hubert_ray.storage.filesystem import Storage

CORPUS, LABELS = "corpora/bench", "labels"
SHARD_BYTES = 32 * 2**20


def recordings(audio: Path | None, hours: float) -> Iterator[RawUtterance]:
    """The FLAC files below a folder, again from the first where they are too few, or noise with the loudness contour of syllables,
    LibriSpeech's lengths; so many hours."""
    rng, left = np.random.default_rng(0), hours * 3600 * SAMPLE_RATE
    files = cycle(sorted(audio.rglob("*.flac"))) if audio else None
    for number in range(10**9):
        if files:
            data = next(files).read_bytes()
            left -= soundfile.info(io.BytesIO(data)).frames
        else:
            wave_S = rng.standard_normal(int(rng.uniform(2, 16) * SAMPLE_RATE)) * 0.03
            wave_S *= 1 + np.sin(np.arange(len(wave_S)) * 2 * np.pi * 4 / SAMPLE_RATE)
            buffer = io.BytesIO()
            soundfile.write(buffer, wave_S, SAMPLE_RATE, format="FLAC")
            data = buffer.getvalue()
            left -= len(wave_S)
        yield RawUtterance(f"u{number:06d}", "s", "train", "flac", data)
        if left <= 0:
            return


def store(storage: Storage, utterances: Iterator[RawUtterance]) -> Manifest:
    """Writes a corpus of shards with its manifest parts; returns the whole manifest."""
    tables: list[pa.Table] = []
    for first in utterances:
        name = f"train-{len(tables):05d}"
        tables.append(write_shard(storage, CORPUS, name, chain([first], _up_to(utterances, SHARD_BYTES))).manifest)
        storage.write(f"{CORPUS}/{layout.manifest_part(name)}", schemas.encode(tables[-1]))
    return Manifest(pa.concat_tables(tables))


def _up_to(utterances: Iterator[RawUtterance], size: int) -> Iterator[RawUtterance]:
    while size > 0 and (utterance := next(utterances, None)):
        size -= len(utterance.audio)
        yield utterance


def _store_labels(storage: Storage, manifest: Manifest) -> None:
    rng = np.random.default_rng(0)
    for shard in manifest.shards():
        rows = Manifest.read_shard(storage, CORPUS, shard)
        labels = [rng.integers(0, 500, frames_of(int(n))).astype(np.uint16) for n in rows.numbers("samples")]
        rates = pa.array(np.full(len(labels), 50, dtype=np.int16))
        columns = [rows.table["utterance_id"], pa.array(labels, schemas.LABELS.field("labels").type), rates]
        storage.write(f"{LABELS}/{layout.part(shard)}", schemas.encode(pa.table(columns, schema=schemas.LABELS)))


class Bench:
    """One epoch over a corpus, loaded in several ways. Each way returns seconds of decoded audio per second."""

    def __init__(self, local: Storage, manifest: Manifest):
        self._local, self._manifest = local, manifest
        plan = BatchPlan(manifest.numbers("samples"), Pretrain(steps=1, peak_lr=5e-4))
        steps = range(max(1, plan.steps_per_epoch - 1))  # the last one is filled up from the beginning
        self._batches = [batch for step in steps for batch in plan.step(step)]
        self._rows = np.concatenate([batch.rows for batch in self._batches]).tolist()
        self._labels = LabelStore(
            local, CORPUS, LABELS, write_index(local, CORPUS, [(shard, "train", "") for shard in manifest.shards()]), 50
        )

    def _rate(self, begun: float, rows: list[int]) -> float:
        return float(self._manifest.numbers("samples")[rows].sum() / SAMPLE_RATE / (time.perf_counter() - begun))

    def _ranges(self, rows: list[int]) -> Iterator[tuple[str, int, int]]:
        table = self._manifest.table
        for row in rows:
            yield table["shard"][row].as_py(), table["offset"][row].as_py(), table["size"][row].as_py()

    def raw(self) -> float:
        reader = AudioReader(self._local, CORPUS)
        data = [reader.read(*at) for at in self._ranges(self._rows)]
        begun = time.perf_counter()
        for item in data:
            soundfile.read(io.BytesIO(item), dtype="float32")
        return self._rate(begun, self._rows)

    def _reader(self, storage: Storage) -> AudioReader:
        """With all shards open, as they are after the first steps of a run."""
        reader = AudioReader(storage, CORPUS)
        for shard in self._manifest.shards():
            reader.read(shard, 0, 1)
        return reader

    def ours(self, storage: Storage) -> float:
        utterances = UtteranceReader(self._reader(storage), self._manifest, normalize=False)
        begun = time.perf_counter()

        def load(batch: MicroBatch) -> int:
            return utterances.crops(batch, self._labels).wave_BS.shape[0]

        assert sum(ahead(load, self._batches, PREFETCH)) == len(self._rows)
        return self._rate(begun, self._rows)

    def fetch(self, storage: Storage) -> float:
        reader = self._reader(storage)
        begun = time.perf_counter()
        for _ in ahead(lambda at: len(reader.read(*at)), self._ranges(self._rows), FETCHES):
            pass
        return self._rate(begun, self._rows)

    def one_at_a_time(self, storage: Storage) -> float:
        rows = self._rows[: len(self._rows) // 8 + 1]
        utterances = UtteranceReader(self._reader(storage), self._manifest, normalize=False)
        begun = time.perf_counter()
        for row in rows:
            utterances.wave(row)
        return self._rate(begun, rows)


class _RangeServer:
    """As much of S3 as reading takes, over the files below a folder, each request answered so many seconds late."""

    def __init__(self, root: str, latency: float):
        self._root, self._latency = Path(root), latency

    async def serve(self, port: Connection) -> None:
        server = await asyncio.start_server(self._answer_all, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    async def _answer_all(self, requests: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await requests.readuntil(b"\r\n\r\n")).decode()
                await asyncio.sleep(self._latency)
                answers.write(self._answer(*head.split(" ", 2)))
                await answers.drain()

    def _answer(self, method: str, target: str, rest: str) -> bytes:
        path, _, query = unquote(target).partition("?")
        file = self._root / path.split("/", 2)[-1]  # below the bucket
        if query:  # a listing: of a folder that does not exist
            return _http("200 OK", b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>")
        if not file.is_file():
            return _http("404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>" if method == "GET" else b"")
        size, wanted = file.stat().st_size, re.search(r"range: bytes=(\d+)-(\d+)", rest, re.IGNORECASE)
        if method == "HEAD":
            return _http("200 OK", b"", size)
        first, last = (int(wanted[1]), min(int(wanted[2]), size - 1)) if wanted else (0, size - 1)
        with file.open("rb") as opened:
            opened.seek(first)
            body = opened.read(last + 1 - first)
        return _http("206 Partial Content" if wanted else "200 OK", body)


def _http(status: str, body: bytes, size: int | None = None) -> bytes:
    length = len(body) if size is None else size
    modified = "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT"
    return f'HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{modified}\r\nETag: "0"\r\n\r\n'.encode() + body


def _serve(root: str, latency: float, port: Connection) -> None:
    asyncio.run(_RangeServer(root, latency).serve(port))


@contextlib.contextmanager
def s3(root: str, latency: float) -> Iterator[str]:
    """URL of a bucket on loopback that holds the files below `root`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(root, latency, theirs), daemon=True)
    process.start()
    yield f"s3://k:s@speech/bench?endpoint_override=127.0.0.1:{ours.recv()}&scheme=http&region=us-east-1"
    process.terminate()
    process.join()


def measure(options: argparse.Namespace) -> dict:
    """Every figure of one run: medians, and all rounds."""
    rounds: dict[str, list[float]] = {}

    def note(name: str, rate: float) -> None:
        rounds.setdefault(name, []).append(round(rate, 1))

    with tempfile.TemporaryDirectory(prefix="hubert-ray-bench-") as folder, s3(folder, options.latency) as url:
        local = Storage(f"{folder}/bench")
        manifest = store(local, recordings(options.audio, options.hours))
        _store_labels(local, manifest)
        remote = Storage(url)
        bench = Bench(local, manifest)
        for number in range(options.repeats):
            cached = Storage(url, RangeCache(f"{folder}/cache-{number}", 2**40))
            note("raw", bench.raw())
            note("ours", bench.ours(local))
            note("s3", bench.ours(remote))
            note("s3_fetch", bench.fetch(remote))
            note("s3_one_at_a_time", bench.one_at_a_time(remote))
            note("s3_filling_cache", bench.ours(cached))
            note("s3_cached", bench.ours(cached))
    rates = {name: statistics.median(found) for name, found in rounds.items()}
    return {
        "utterances": len(manifest),
        "hours": round(float(manifest.numbers("samples").sum()) / SAMPLE_RATE / 3600, 2),
        "latency": options.latency,
        "rates": rates,
        "share_of_raw": {name: round(rate / rates["raw"], 3) for name, rate in rates.items() if name != "raw"},
        "rounds": rounds,
    }


def as_a_worker() -> None:
    """Begins this command again with the environment that a worker of one CPU has; libraries read it when they are loaded."""
    wanted = {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1"}
    if not wanted.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | wanted)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument("--audio", type=Path, help="a folder of FLAC files; made-up ones without it")
    parser.add_argument("--hours", type=float, default=2.0, help="of audio")
    parser.add_argument("--latency", type=float, default=0.03, help="seconds by which S3 answers late")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    as_a_worker()
    result = measure(options)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{result['utterances']} utterances, {result['hours']} h; S3 answers {options.latency * 1000:.0f} ms late")
    for name, rate in result["rates"].items():
        spread = f"({min(result['rounds'][name]):.0f} to {max(result['rounds'][name]):.0f})"
        print(f"{name:18} {rate:8.0f} x real time {spread:16} {result['share_of_raw'].get(name, 1.0):6.2f} of raw")


if __name__ == "__main__":
    main()
