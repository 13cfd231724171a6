"""What does training say about itself? metrics.jsonl and TensorBoard from rank 0, a line on the console from the driver."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from pathlib import Path

import msgspec

from hubert_ray.storage import layout
from hubert_ray.storage.filesystem import Storage


class Telemetry:
    """The log of one training artifact. `resume_step`: rows after it came from steps that will be done again."""

    def __init__(self, storage: Storage, folder: str, resume_step: int):
        self._storage = storage
        self._folder = folder
        self._rows = [row for row in read(storage, folder) if row["step"] <= resume_step]

    def log(self, row: dict[str, float]) -> None:
        """Adds a row; `row["step"]` counts finished steps. The file on storage is whole after each call."""
        self._rows.append(row)
        data = b"".join(msgspec.json.encode(r) + b"\n" for r in self._rows)
        self._storage.write(f"{self._folder}/{layout.METRICS}", data)

    def close(self) -> None:
        """Puts a TensorBoard file of all rows beside the metrics."""
        from torch.utils.tensorboard import SummaryWriter  # a second of imports that only rank 0 needs

        with tempfile.TemporaryDirectory(prefix="hubert-ray-tensorboard-") as folder:
            with SummaryWriter(folder) as writer:
                for row in self._rows:
                    for name, value in row.items():
                        if name != "step":
                            writer.add_scalar(name, value, row["step"])
            self._storage.delete(f"{self._folder}/tensorboard")
            self._storage.upload(Path(folder), f"{self._folder}/tensorboard")


class Progress:
    """Prints the metrics of running artifacts as they appear on storage, whichever node they are computed on."""

    def __init__(self, storage: Storage, folders: dict[str, str], total_steps: int, interval_seconds: float = 2.0):
        self._storage, self._folders, self._total = storage, folders, total_steps
        self._interval = interval_seconds
        self._printed = {
            title: max((row["step"] for row in read(storage, f)), default=0) for title, f in folders.items()
        }
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._print()

    def _follow(self) -> None:
        while not self._ended.wait(self._interval):
            with contextlib.suppress(OSError):  # a storage that does not answer once costs a line on the console
                self._print()

    def _print(self) -> None:
        for title, folder in self._folders.items():
            for row in read(self._storage, folder):
                if row["step"] > self._printed[title]:
                    self._printed[title] = row["step"]
                    rest = "  ".join(
                        f"{name} {value:.4g}" for name, value in row.items() if name not in ("step", "seconds")
                    )
                    print(f"{title}  step {row['step']:>6}/{self._total}  {rest}", flush=True)


def read(storage: Storage, folder: str) -> list[dict[str, float]]:
    """The rows of metrics.jsonl; none where there is no file."""
    path = f"{folder}/{layout.METRICS}"
    if not storage.exists(path):
        return []
    return [msgspec.json.decode(line) for line in storage.read(path).splitlines()]
