"""Which rows of a corpus repeat an earlier one? Found with memory for a sixty-fourth of the keys at a time.

Every row has two 16-byte keys, digests of its id and of its samples. Keys are dealt by their first bits into 64 temporary
files of 24-byte records (Grace's partitioning), so that equal keys meet in one; each file is then sorted alone. For 200
million rows they are 4.8 GB a kind of key on the driver's disk. What is found takes 16 bytes a repeat.

A row's place is its shard and its row there, 32 bits each; of two rows alike the one at the earlier place stays.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage

BUCKETS = 64
KEY_BYTES = 16

_RECORD = np.dtype([("high", ">u8"), ("low", ">u8"), ("place", "<u8")])
_SCHEMA = pa.schema([("shard", pa.string()), *schemas.QUARANTINE])


def set_repeats_aside(storage: Storage, path: str, shards: Mapping[str, bool]) -> None:
    """Takes out of a corpus's parts what a shard before has, and says so in `repeats.parquet`, whose rows are those of the
    quarantine table and a shard. Broken off and done again, it goes on. `shards`, in their order: whether a shard gives up
    not only repeated ids but also repeated samples, of whichever shard before."""
    file = f"{path}/{layout.REPEATS}"
    if not storage.exists(file):
        with storage.create(file) as stream, pq.ParquetWriter(stream, _SCHEMA, compression="zstd") as writer:
            for table in _found(storage, path, shards):
                writer.write_table(table)
    for group in _row_groups(storage, file):
        part = f"{path}/{layout.manifest_part(group['shard'][0].as_py())}"
        rows = schemas.decode(storage.read(part))
        kept = rows.filter(pc.invert(pc.is_in(rows["utterance_id"], group["source"].combine_chunks())))
        if kept.num_rows < rows.num_rows:
            storage.write(part, schemas.encode(kept))


def _row_groups(storage: Storage, file: str) -> Iterator[pa.Table]:
    with storage.open(file) as stream:
        table = pq.ParquetFile(stream)
        for number in range(table.num_row_groups):
            yield table.read_row_group(number)


def _found(storage: Storage, path: str, rejects: Mapping[str, bool]) -> Iterator[pa.Table]:
    """What is to leave each shard. Ids first: what goes for its id is no earlier copy of anything."""
    shards = list(rejects)

    @lru_cache(maxsize=16)
    def ids_of(number: int) -> pa.ChunkedArray:
        return schemas.decode(storage.read(f"{path}/{layout.manifest_part(shards[number])}"), ["utterance_id"])[
            "utterance_id"
        ]

    with RepeatFinder() as ids, RepeatFinder() as samples:
        for number, shard in enumerate(shards):
            part = schemas.decode(storage.read(f"{path}/{layout.manifest_part(shard)}"), ["utterance_id", "digest"])
            place_N = np.uint64(number << 32) | np.arange(part.num_rows, dtype=np.uint64)
            names = (name.encode() for name in part["utterance_id"].to_pylist())
            ids.add(b"".join(hashlib.blake2b(name, digest_size=KEY_BYTES).digest() for name in names), place_N)
            if any(rejects.values()):
                samples.add(b"".join(part["digest"].to_pylist()), place_N)
        by_id = ids.repeats(np.empty(0, np.uint64))
        later_R, first_R = samples.repeats(by_id[0])
    strict_R = np.array([*rejects.values()], dtype=bool)[later_R >> np.uint64(32)]
    by_samples = later_R[strict_R], first_R[strict_R]
    later_R, first_R = (np.concatenate(pair) for pair in zip(by_id, by_samples, strict=True))
    shard_R = later_R >> np.uint64(32)
    order_R = np.lexsort([first_R, shard_R])  # one earlier part after another: each is read once for a shard
    for rows_R in np.split(order_R, np.flatnonzero(np.diff(shard_R[order_R])) + 1) if len(order_R) else ():
        number = int(shard_R[rows_R[0]])
        rows = []
        for row, later, first in zip(rows_R, later_R[rows_R], first_R[rows_R], strict=True):
            reason, what = ("duplicate_id", "the id") if row < len(by_id[0]) else ("duplicate_content", "the samples")
            earlier = int(first) >> 32
            name = ids_of(earlier)[int(first) & 2**32 - 1].as_py()
            rows.append(
                {
                    "shard": shards[number],
                    "source": ids_of(number)[int(later) & 2**32 - 1].as_py(),
                    "reason": reason,
                    "detail": f"{what} of '{name}' in shard {shards[earlier]}",
                }
            )
        yield pa.Table.from_pylist(rows, schema=_SCHEMA)


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
