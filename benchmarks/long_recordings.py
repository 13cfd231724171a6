"""What does it cost to read ten seconds deep inside a long recording, from a local disk and over an S3 API?

    python -m benchmarks.long_recordings                                       an hour of made-up sound, FLAC and WAV
    python -m benchmarks.long_recordings --audio /data/LibriSpeech --json      an hour of real speech
    python -m benchmarks.long_recordings --formats flac,wav,ogg,opus

`seek` is what training does (`AudioReader.wave` of a piece); `from_start` decodes the recording from its beginning to the end of
the piece. The S3 server is moto's, in memory, in this process: its requests and bytes are counted at the server and hold for any
S3, its times are moto's own. `detector` is voice activity on one core, in seconds of audio per second.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import logging
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import soundfile
from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from hubert_ray.config.recipe import Segments
from hubert_ray.data import audio
from hubert_ray.data.frames import SAMPLE_RATE
from hubert_ray.data.shards import AudioReader, RawUtterance, write_shard
from hubert_ray.storage import layout
from hubert_ray.storage.filesystem import Storage

CORPUS, SHARD, SECONDS = "corpora/long", "train-00000", 10
KINDS = {"flac": ("FLAC", None), "wav": ("WAV", None), "ogg": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS")}


def sound(folder: Path | None, minutes: int) -> Iterator[np.ndarray]:
    """int16 at 16 kHz in parts: the speech of a folder of 16 kHz FLAC files, or noise whose loudness comes and goes."""
    left = minutes * 60 * SAMPLE_RATE
    if folder:
        for path in sorted(folder.rglob("*.flac")):
            wave_S = soundfile.read(path, dtype="int16")[0][:left]
            yield wave_S
            left -= len(wave_S)
            if not left:
                return
        raise SystemExit(f"{folder} holds less than {minutes} minutes of .flac")
    rng = np.random.default_rng(0)
    swell_S = 1500 * (1 + np.sin(np.arange(SAMPLE_RATE) * 2 * np.pi / SAMPLE_RATE))
    for _ in range(minutes * 60):
        yield (swell_S * rng.standard_normal(SAMPLE_RATE)).astype(np.int16)


class _Counted:
    """A WSGI application whose GET requests and sent bytes are counted."""

    def __init__(self, inner: Callable[..., Any]):
        self._inner = inner
        self.requests = self.bytes = 0

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        def begin(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            if environ["REQUEST_METHOD"] == "GET":
                self.requests += 1
                self.bytes += int(dict(headers).get("Content-Length", 0))
            return start(status, headers, *rest)

        return self._inner(environ, begin)


@contextmanager
def s3() -> Iterator[tuple[str, _Counted]]:
    """(URL of an empty bucket on loopback, the counter)."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    counted = _Counted(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, counted, True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_address[1]}"
    keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://{address}", **keys).create_bucket(Bucket="speech")
    yield f"s3://k:s@speech/b?endpoint_override={address}&scheme=http&region=us-east-1", counted
    server.shutdown()


def _milliseconds(work: Callable[[], Any], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - begun))
    return round(statistics.median(taken), 2)


def measure(data: bytes, kind: str, places: list[int], repeats: int) -> dict[str, Any]:
    """Figures per place (minute) of one recording."""
    speech = [(60.0 * minute, 60.0 * minute + SECONDS) for minute in places]
    raw = RawUtterance("long", "s", "train", kind, data, speech=speech)
    found: dict[str, Any] = {"file_bytes": len(data)}
    with tempfile.TemporaryDirectory() as folder, s3() as (url, counted):
        local, remote = Storage(folder), Storage(url)
        rows = write_shard(local, CORPUS, SHARD, [raw], segments=Segments()).manifest.to_pylist()
        remote.write(f"{CORPUS}/{layout.audio_shard(SHARD)}", local.read(f"{CORPUS}/{layout.audio_shard(SHARD)}"))
        for minute, row in zip(places, rows, strict=True):
            place = (SHARD, row["offset"], row["size"], row["first"], row["stored_samples"])
            near, far = AudioReader(local, CORPUS), AudioReader(remote, CORPUS)
            near.wave(*place), far.wave(*place)  # opens the files
            counted.requests = counted.bytes = 0
            assert np.array_equal(far.wave(*place), near.wave(*place))
            found[f"minute_{minute}"] = {
                "seek_ms": _milliseconds(lambda: near.wave(*place), repeats),  # noqa: B023
                "s3_requests": counted.requests,
                "s3_bytes": counted.bytes,
                "s3_ms": _milliseconds(lambda: far.wave(*place), repeats),  # noqa: B023
                "from_start_ms": _milliseconds(
                    lambda: audio.decode_range(io.BytesIO(data), 0, row["first"] + row["stored_samples"]),  # noqa: B023
                    1,
                ),
            }
    return found


def detector_speed(wave_S: np.ndarray) -> float | None:
    """Seconds of audio per second; None where the detector is not installed."""
    if not importlib.util.find_spec("silero_vad"):
        return None
    from hubert_ray.data.voice_activity import VoiceActivity

    detector = VoiceActivity()
    detector.hear(wave_S[: 10 * SAMPLE_RATE])  # compiles
    return round(1000 * len(wave_S) / SAMPLE_RATE / _milliseconds(lambda: detector.hear(wave_S), 3), 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_recordings", description=__doc__.splitlines()[0])
    parser.add_argument("--audio", type=Path, help="a folder of 16 kHz FLAC files, joined to one recording")
    parser.add_argument("--minutes", type=int, default=60, help="length of the recording")
    parser.add_argument("--formats", default="flac,wav", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--repeats", type=int, default=9, help="readings, of which the median counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    formats = options.formats.split(",")
    if options.minutes < 3 or options.repeats < 1 or not set(formats) <= set(KINDS):
        parser.error(f"expected --minutes from 3, --repeats from 1 and --formats of {', '.join(KINDS)}")
    places = sorted({1, options.minutes // 2, options.minutes * 5 // 6})
    result: dict[str, Any] = {
        "minutes": options.minutes,
        "audio": "speech" if options.audio else "made up",
        "formats": {},
    }
    for kind in formats:
        buffer = io.BytesIO()
        container, subtype = KINDS[kind]
        with soundfile.SoundFile(buffer, "w", SAMPLE_RATE, 1, format=container, subtype=subtype) as file:
            for part_S in sound(options.audio, options.minutes):
                file.write(part_S)
        result["formats"][kind] = measure(buffer.getvalue(), kind, places, options.repeats)
    first = audio.decode_range(io.BytesIO(buffer.getvalue()), 0, 60 * SAMPLE_RATE)
    result["detector"] = detector_speed(first)
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"{SECONDS} s out of {options.minutes} minutes ({result['audio']}); detector {result['detector']} x real time"
    )
    for kind, found in result["formats"].items():
        for place, row in found.items():
            if place != "file_bytes":
                print(f"{kind:5} {place:10} {'   '.join(f'{name} {value}' for name, value in row.items())}")


if __name__ == "__main__":
    main()
