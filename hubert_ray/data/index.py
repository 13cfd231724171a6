"""Where is utterance N of 200 million, and how long is it? In columns of numbers on disk, of which memory holds the pages in use.

Strings (ids, texts, phones) stay in the manifest parts, one per shard. What training and labels need of every utterance is written
once, by prepare_data, in the order of the parts: `index/offset.i8`, `index/size.u4`, …, each a bare array of little-endian numbers,
28 bytes an utterance in all. `index/shards.json` says which rows are which shard's, and what the parts add up to.

A shard is of one split and of one part of a mix, and shards are sorted by both: a split is a range of rows and so is a part of
it, and no row needs a column that says so. Local storage is mapped in place; from an object store the columns are copied once per
node, into its temporary folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hubert_ray.data.frames import SAMPLE_RATE
from hubert_ray.errors import CorpusError
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage

# Of schemas.MANIFEST, with the width that they have in the index.
COLUMNS = {"offset": "<i8", "size": "<u4", "first": "<i8", "stored_samples": "<i4", "samples": "<u4"}
_AT_ONCE = 2**24  # keys, 128 MiB, that are sorted at a time
_COPY_BYTES = 2**24
_SETTLED_AT_LEAST = 2**16  # hashes that wait to be sorted in


class Shard(msgspec.Struct, frozen=True):
    """Neighbouring rows of the index, whose audio is in one tar and whose strings are in one manifest part."""

    name: str
    split: str
    part: str  # of a mix; "" where the corpus is none
    utterances: int
    transcribed: int
    aligned: int


class Contents(msgspec.Struct, frozen=True):
    """`index/shards.json`."""

    shards: tuple[Shard, ...]
    digest: str  # of what the manifest parts hold: which speech this is
    speakers: dict[str, int]  # how many, per split
    shared_speakers: tuple[str, ...]  # those of train who are in dev or test too, sorted
    low_rate: int  # utterances stored below 16 kHz


class Index:
    """The utterances of a corpus, or of one split of it, by row."""

    def __init__(self, contents: Contents, shards: tuple[Shard, ...], columns: dict[str, np.ndarray]):
        self.contents = contents
        self.shards = shards
        self._columns = columns
        self._bounds = np.cumsum([0, *(shard.utterances for shard in shards)])  # int64

    @classmethod
    def open(cls, storage: Storage, corpus_path: str) -> Index:
        """Raises CorpusError where there is no index, or not all of it."""
        try:
            contents = msgspec.json.decode(storage.read(f"{corpus_path}/{layout.INDEX}"), type=Contents)
            folder = _mappable(storage, corpus_path, contents.digest)
            columns = {name: _mapped(folder / _file(name), kind) for name, kind in COLUMNS.items()}
        except (FileNotFoundError, ValueError) as error:
            raise CorpusError(
                f"'{corpus_path}' has no index that can be read ({error}): run prepare_data again"
            ) from error
        index = cls(contents, contents.shards, columns)
        if {len(column) for column in columns.values()} != {len(index)}:
            raise CorpusError(
                f"the index of '{corpus_path}' should have {len(index)} rows; its columns have "
                f"{[len(column) for column in columns.values()]}. Remove the corpus and run prepare_data again"
            )
        return index

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def rows_of(self, split: str) -> slice:
        """The rows of a split, which lie together."""
        chosen = [rows for shard, rows in self.by_shard() if shard.split == split]
        return slice(chosen[0].start, chosen[-1].stop) if chosen else slice(0, 0)

    def split(self, name: str) -> Index:
        """One split by itself, its rows numbered from 0 on."""
        rows = self.rows_of(name)
        columns = {key: column[rows] for key, column in self._columns.items()}
        return Index(self.contents, tuple(shard for shard in self.shards if shard.split == name), columns)

    def numbers(self, column: str) -> np.ndarray:
        """A column of `COLUMNS`, mapped from disk: what is taken of it is read, what is made of it is in memory."""
        return self._columns[column]

    def shard_of(self, row: int) -> str:
        """Name of the shard that holds a row."""
        return self.shards[self._number(row)].name

    def id_of(self, storage: Storage, corpus_path: str, row: int) -> str:
        """The utterance's id, for messages: a manifest part is read for it."""
        number = self._number(row)
        part = schemas.decode(
            storage.read(f"{corpus_path}/{layout.manifest_part(self.shards[number].name)}"), ["utterance_id"]
        )
        return part["utterance_id"][row - int(self._bounds[number])].as_py()

    def _number(self, row: int) -> int:
        return int(np.searchsorted(self._bounds, row, side="right")) - 1

    def by_shard(self) -> Iterator[tuple[Shard, slice]]:
        """Each shard with its rows."""
        for number, shard in enumerate(self.shards):
            yield shard, slice(int(self._bounds[number]), int(self._bounds[number + 1]))

    def begin_recordings(self, rows: np.ndarray) -> np.ndarray:
        """For each row whether it is the first of its recording, of which several may be pieces (data/segments.py)."""
        shards, before = (np.searchsorted(self._bounds, place, side="right") for place in (rows, rows - 1))
        offsets = self._columns["offset"]
        return (rows == 0) | (shards != before) | (offsets[rows] != offsets[np.maximum(rows - 1, 0)])

    def audio_bytes(self) -> int:
        """Of all recordings, compressed."""
        total = 0
        for _, rows in self.by_shard():
            begins = self.begin_recordings(np.arange(rows.start, rows.stop))
            total += int(self._columns["size"][rows][begins].sum(dtype=np.int64))
        return total

    def by_part(self) -> dict[str, slice]:
        """The rows of each part of a mix, in their order; of "" where the corpus is no mix."""
        parts: dict[str, slice] = {}
        for shard, rows in self.by_shard():
            parts[shard.part] = slice(parts.get(shard.part, rows).start, rows.stop)
        return parts


def write_index(
    storage: Storage,
    corpus_path: str,
    shards: Iterable[tuple[str, str, str]],
    each: Callable[[Shard, pa.Table], None] = lambda shard, part: None,
) -> Index:
    """Writes the index of manifest parts, given in their order as (shard, split, part of a mix); holds one of them at a time.

    `each` is shown every part on its way. Ids must be unique by then (data/repeats.py).
    Raises CorpusError where a part is not of one split.
    """
    found: list[Shard] = []
    digest, speakers, low_rate = hashlib.sha256(), _Speakers(), 0
    folder = f"{corpus_path}/{layout.INDEX_FOLDER}"
    with ExitStack() as stack:
        columns = {name: stack.enter_context(storage.create(f"{folder}/{_file(name)}")) for name in COLUMNS}
        for name, split, part in shards:
            table = schemas.decode(storage.read(f"{corpus_path}/{layout.manifest_part(name)}"))
            for column in schemas.MANIFEST.names:
                for piece in _content(table[column].combine_chunks()):
                    digest.update(piece)
            if not table.num_rows:
                continue
            known = (table.num_rows - table[column].null_count for column in ("text", "phones"))
            shard = Shard(name, split, part, table.num_rows, *known)
            _check_place(shard, table, found)
            found.append(shard)
            for column, kind in COLUMNS.items():
                columns[column].write(_numbers(table, column, kind, name))
            speakers.add(split, pc.unique(table["speaker"]).to_pylist())
            low_rate += int((table["sample_rate_hz"].to_numpy() < SAMPLE_RATE).sum())
            each(shard, table)
    counts = {split: len(distinct) for split, distinct in speakers.by_split.items()}
    contents = Contents(tuple(found), digest.hexdigest()[:16], counts, tuple(sorted(speakers.shared)), low_rate)
    storage.write(f"{corpus_path}/{layout.INDEX}", msgspec.json.encode(contents))
    return Index.open(storage, corpus_path)


def _content(values: pa.Array) -> Iterator[bytes | pa.Buffer]:
    """What an array holds, as bytes that another writer or reader of Parquet would give too: what lies under its nulls, and how
    a file is laid out and compressed, are no part of it."""
    yield len(values).to_bytes(8, "little")
    yield np.packbits(pc.is_valid(values).to_numpy(zero_copy_only=False)).tobytes()
    values = values.drop_null()
    if pa.types.is_list(values.type):
        yield from _content(pc.list_value_length(values))
        yield from _content(pc.list_flatten(values))
    elif pa.types.is_struct(values.type):
        for field in values.type:
            yield from _content(pc.struct_field(values, field.name))
    elif pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        yield values.to_numpy().tobytes()
    else:  # strings and digests
        strings = values.cast(pa.binary())
        yield from _content(pc.binary_length(strings))
        yield pc.binary_join(pa.ListArray.from_arrays([0, len(strings)], strings), b"")[0].as_buffer()


def _check_place(shard: Shard, table: pa.Table, before: list[Shard]) -> None:
    splits = pc.unique(table["split"]).to_pylist()
    if splits not in ([], [shard.split]):
        raise CorpusError(
            f"shard {shard.name} is of the {shard.split} split, but has utterances of {', '.join(splits)}"
        )
    new_split = bool(before) and before[-1].split != shard.split
    new_part = new_split or (bool(before) and before[-1].part != shard.part)
    split_again = new_split and any(one.split == shard.split for one in before)
    part_again = new_part and any((one.split, one.part) == (shard.split, shard.part) for one in before)
    if split_again or part_again:
        raise CorpusError(f"shard {shard.name} lies apart from the others of its split, or of its part of the mix")


def _numbers(table: pa.Table, column: str, kind: str, shard: str) -> bytes:
    try:
        return table[column].cast(pa.from_numpy_dtype(kind)).to_numpy().astype(kind).tobytes()
    except pa.ArrowInvalid as error:
        raise CorpusError(f"shard {shard}: {column}: {error}; cut that recording into shorter ones") from error


class _Speakers:
    """How many there are in each split, and who is in train and in another one too. Train comes first."""

    def __init__(self) -> None:
        self.by_split: dict[str, _Distinct] = {}
        self.shared: set[str] = set()

    def add(self, split: str, names: list[str]) -> None:
        named = np.array([name for name in names if name], dtype=object)  # "" is an unknown speaker
        # Python's own hashes: the same within a process, which is as far as they go.
        hashes = np.fromiter(map(hash, named), dtype=np.int64, count=len(named))
        if split != "train" and "train" in self.by_split:
            self.shared |= set(named[self.by_split["train"].have(hashes)])
        self.by_split.setdefault(split, _Distinct()).add(hashes)


class _Distinct:
    """Which hashes have come so far: 8 bytes each, sorted."""

    def __init__(self) -> None:
        self._sorted, self._late = np.empty(0, np.int64), [np.empty(0, np.int64)]
        self._waiting = 0

    def add(self, hashes: np.ndarray) -> None:
        self._late.append(hashes)
        self._waiting += len(hashes)
        if self._waiting > max(_SETTLED_AT_LEAST, len(self._sorted) // 4):
            self._settle()

    def _settle(self) -> None:
        self._sorted = np.unique(np.concatenate([self._sorted, *self._late]))
        self._late, self._waiting = [], 0

    def __len__(self) -> int:
        self._settle()
        return len(self._sorted)

    def have(self, hashes: np.ndarray) -> np.ndarray:
        """For each hash whether it has come."""
        self._settle()
        return np.isin(hashes, self._sorted)


def repeated(keys_of: Callable[[slice], np.ndarray], total: int) -> np.ndarray:
    """Rows, ascending, whose int64 key is another row's too. `keys_of` gives the keys of a slice of the rows.

    Goes over the keys several times, so that what it sorts at a time stays small.
    """
    turns, found = -(-total // _AT_ONCE), [np.empty(0, np.int64)]
    for turn in range(turns):
        chosen_rows, chosen_keys = [], []
        for start in range(0, total, _AT_ONCE):
            keys_N = keys_of(slice(start, min(start + _AT_ONCE, total)))
            rows_M = np.flatnonzero(keys_N % turns == turn)
            chosen_rows.append(rows_M + start)
            chosen_keys.append(keys_N[rows_M])
        rows, keys = np.concatenate(chosen_rows), np.concatenate(chosen_keys)
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        found.append(rows[order[np.union1d(same, same + 1)]])
    return np.sort(np.concatenate(found))


def _file(column: str) -> str:
    return f"{column}.{COLUMNS[column].lstrip('<')}"


def _mapped(file: Path, kind: str) -> np.ndarray:
    if not file.stat().st_size:
        return np.empty(0, kind)  # nothing cannot be mapped
    return np.asarray(np.memmap(file, dtype=kind, mode="r"))


def _mappable(storage: Storage, corpus_path: str, digest: str) -> Path:
    """A local folder that holds the columns: where they lie, or this node's copy, made by whichever process comes first."""
    folder = f"{corpus_path}/{layout.INDEX_FOLDER}"
    if storage.is_local:
        return Path(storage.full(folder))
    copy = Path(tempfile.gettempdir()) / f"hubert-ray-index-{os.getuid()}-{digest}"
    copy.mkdir(mode=0o700, exist_ok=True)
    with (copy / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in map(_file, COLUMNS):
            if not (copy / name).exists():
                with storage.open(f"{folder}/{name}") as source, (copy / f"{name}.part").open("wb") as target:
                    shutil.copyfileobj(source, target, _COPY_BYTES)
                (copy / f"{name}.part").replace(copy / name)
    return copy
