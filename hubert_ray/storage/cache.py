"""Which pieces of remote files does a node keep on its own disk? The ranges read last, up to a budget, shared by its workers.

One file per range, named by a hash of what it is, in 256 folders. Nobody coordinates: a file appears by renaming, so readers see
all of it or nothing and writers of the same range do no harm; a read sets its time, and now and then a write removes the oldest
files of its folder. Each ends in a checksum, so what a crash or a full disk left behind is read again from storage. A disk
that is full or gone costs the cache, never the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
import zlib
from dataclasses import dataclass

_FOLDERS = 256
_SWEEP_EVERY = 16  # writes, of all workers together, on average
_CHECKSUM = 4  # bytes


@dataclass(frozen=True)
class RangeCache:
    """At most about `budget` bytes below `folder`; each of the 256 folders has an equal share of them."""

    folder: str
    budget: int

    def get(self, key: str) -> bytes | None:
        """The bytes kept under `key`, or None."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                kept = file.read()
            os.utime(path)
        except OSError:  # not there, or removed meanwhile
            return None
        data, checksum = kept[:-_CHECKSUM], kept[-_CHECKSUM:]
        return data if checksum == _checksum(data) else None

    def put(self, key: str, data: bytes) -> None:
        """Keeps the bytes, unless they are too many for a folder's share or the disk does not take them."""
        path = self._path(key)
        share = self.budget // _FOLDERS
        if len(data) > share:
            return
        folder = os.path.dirname(path)
        temporary = f"{folder}/.part-{uuid.uuid4().hex}"
        try:
            os.makedirs(folder, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.write(_checksum(data))
            os.replace(temporary, path)
            if int(os.path.basename(path)[:8], 16) % _SWEEP_EVERY == 0:
                _sweep(folder, share)
        except OSError:
            with contextlib.suppress(OSError):
                os.remove(temporary)

    def _path(self, key: str) -> str:
        name = hashlib.sha256(key.encode()).hexdigest()
        return f"{self.folder}/{name[:2]}/{name[2:]}"


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECKSUM, "big")


def _sweep(folder: str, share: int) -> None:
    """Removes the files read longest ago until seven eighths of the share are left. Others may sweep at the same time."""
    files = []
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):
            found = entry.stat()
            files.append((found.st_mtime_ns, found.st_size, entry.path))
    size = sum(bytes_ for _, bytes_, _ in files)
    for _, bytes_, path in sorted(files):
        if size <= share * 7 // 8:
            break
        with contextlib.suppress(OSError):
            os.remove(path)
        size -= bytes_
