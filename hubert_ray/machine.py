"""On what did it run? Versions, hardware and memory in use, as they are put into seals and reports."""

from __future__ import annotations

import os
import platform
import threading
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Any

_LIBRARIES = ("hubert-ray", "torch", "torchaudio", "ray", "deepspeed", "faiss-gpu", "numpy", "pyarrow", "soundfile")


@dataclass(frozen=True)
class NodeReport:
    """What a node of a cluster says of itself."""

    node: str
    versions: dict[str, str]
    storage_error: str | None  # None: it wrote a file there and read it back
    gpu_gib: float | None  # of its smallest GPU


def versions() -> dict[str, str]:
    """Of the libraries that results may depend on."""
    found = {name: metadata.version(name) for name in _LIBRARIES} | {"python": platform.python_version()}
    with suppress(metadata.PackageNotFoundError):
        found["silero-vad"] = metadata.version("silero-vad")  # an extra; its model decides where recordings are cut
    return found


def hardware() -> dict[str, Any]:
    """Of the driver's machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpus": os.cpu_count(), "memory_gib": round(memory, 1), "cpu_model": _cpu_model()}


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class PeakMemory:
    """Most memory in use on the driver's machine while the block ran, all processes together, sampled twice a second.

    Whole-machine figures count shared pages once, which sums over processes do not; on a busy machine they count others
    too. `gib` is None where the system does not tell.
    """

    INTERVAL_SECONDS = 0.5

    def __enter__(self) -> PeakMemory:
        self._peak = _used_gib()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def gib(self) -> float | None:
        return None if self._peak is None else round(self._peak, 2)

    def _watch(self) -> None:
        while not self._ended.wait(self.INTERVAL_SECONDS):
            used = _used_gib()
            if used is not None and self._peak is not None:
                self._peak = max(self._peak, used)


def _used_gib() -> float | None:
    try:
        with open("/proc/meminfo") as lines:
            kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return (kib["MemTotal"] - kib["MemAvailable"]) / 2**20
    except (OSError, KeyError):
        return None
