"""Which rows of a corpus repeat an earlier one? Found with memory for a sixty-fourth of the keys at a time.

Every row has a 16-byte key, such as a digest of its id or of its samples. Keys are dealt by their first bits into 64 temporary
files of 24-byte records (Grace's partitioning), so that equal keys meet in one; each file is then sorted alone. For 200
million rows the files are 4.8 GB on the driver's disk and a file 3.1 million records. What is found takes 16 bytes a repeat.
"""

from __future__ import annotations

import tempfile
from typing import IO

import numpy as np

BUCKETS = 64
KEY_BYTES = 16
_RECORD = np.dtype([("high", ">u8"), ("low", ">u8"), ("place", "<u8")])


class RepeatFinder:
    """Collects (key, place) records; a place is any number by which earlier and later are told. A context manager."""

    def __enter__(self) -> RepeatFinder:
        self._files: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(BUCKETS)]
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def add(self, keys: bytes, places_N: np.ndarray) -> None:
        """`keys`: 16 bytes for each of the N places (uint64)."""
        records_N = np.empty(len(places_N), _RECORD)
        halves_N2 = np.frombuffer(keys, ">u8").reshape(-1, 2)
        records_N["high"], records_N["low"], records_N["place"] = halves_N2[:, 0], halves_N2[:, 1], places_N
        bucket_N = (halves_N2[:, 0] // (2**64 // BUCKETS)).astype(np.uint8)
        order = np.argsort(bucket_N, kind="stable")
        borders = np.searchsorted(bucket_N[order], np.arange(1, BUCKETS))
        for file, some in zip(self._files, np.split(records_N[order], borders), strict=True):
            file.write(some.tobytes())

    def repeats(self, but_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places whose key has an earlier place, and for each the earliest; rows at the places `but_N` count as absent."""
        found = [_repeats(file, but_N) for file in self._files]
        later_R, first_R = (np.concatenate([pair[k] for pair in found]) for k in (0, 1))
        order = np.argsort(later_R)
        return later_R[order], first_R[order]


def _repeats(file: IO[bytes], but_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    file.seek(0)
    records_N = np.frombuffer(file.read(), _RECORD)
    records_N = records_N[_twins(records_N["high"].astype(np.uint64))]  # few, as a rule: only they are sorted in full
    records_N = records_N[~np.isin(records_N["place"], but_N)]
    records_N = records_N[np.lexsort([records_N[name] for name in ("place", "low", "high")])]
    same_N = np.zeros(len(records_N), dtype=bool)
    same_N[1:] = records_N[["high", "low"]][1:] == records_N[["high", "low"]][:-1]
    first_N = np.maximum.accumulate(np.where(same_N, 0, np.arange(len(records_N))))
    return records_N["place"][same_N], records_N["place"][first_N[same_N]]


def _twins(values_N: np.ndarray) -> np.ndarray:
    """Indices of the values that occur more than once."""
    order = np.argsort(values_N)
    equal = values_N[order][1:] == values_N[order][:-1]
    return order[np.append(equal, False) | np.append(False, equal)] if len(order) else order
