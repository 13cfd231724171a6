"""How is a corpus stored, and how is one utterance read back?

A corpus is a folder of uncompressed tar shards in WebDataset's form (`<key>.flac`, `<key>.txt`) holding the original
compressed audio, and for each shard a manifest part with one row per utterance. Because a tar member is a plain byte range, any
utterance is one ranged read away; nothing is ever unpacked. The numbers of all parts together are in the index (data/index.py).
Of a long recording that was cut (data/segments.py) each piece is a row, a range of samples of the same member: the decoder seeks
in it through a window that fetches only the blocks it asks for.

Tars that were WebDataset shards before stay where they are: the manifest's ranges point into them, and `locations.json` says
where they lie, which may change without the corpus being another.
"""

from __future__ import annotations

import io
import os
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hubert_ray.config.recipe import Checks, Segments
from hubert_ray.data import audio
from hubert_ray.data.segments import Cutter
from hubert_ray.data.window import Window
from hubert_ray.errors import AudioError, CorpusError
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.cache import RangeCache
from hubert_ray.storage.filesystem import Storage

WHOLE: dict[str, Any] = {"first": 0, "stored_samples": -1}  # the range of an utterance that is its recording


@dataclass(frozen=True)
class RawUtterance:
    """One recording as its corpus has it. `phones` are (start, end, phone) in 16 kHz samples."""

    utterance_id: str
    speaker: str
    split: str
    suffix: str  # "flac", "wav", …
    audio: bytes
    text: str | None = None
    phones: list[tuple[int, int, str]] | None = None
    offset: int | None = None  # of the audio in a tar that stays where it is, bytes
    speech: list[tuple[float, float]] | None = None  # voice activity, seconds, where the corpus has it


@dataclass(frozen=True)
class Rejected:
    """Something a source met that is not a usable utterance: a row of the quarantine table."""

    source: str
    reason: str
    detail: str


@dataclass(frozen=True)
class ShardTables:
    """What became of one shard's recordings."""

    manifest: pa.Table
    quarantine: pa.Table


class Locations(msgspec.Struct, frozen=True):
    """Where the tars of a corpus are that was indexed in place, in full or in part. To be changed by hand when they have moved."""

    tars: dict[str, tuple[str, str]]  # shard -> folder or URL, and the tar below it


def write_shard(
    storage: Storage,
    corpus_path: str,
    shard: str,
    utterances: Iterable[RawUtterance | Rejected],
    *,
    checks: Checks = Checks(),  # noqa: B008  # frozen
    segments: Segments | None = None,
) -> ShardTables:
    """Writes one tar and returns its manifest rows and its quarantine rows. The tar's bytes depend on its input only.

    With `segments`, recordings longer than those allow become several rows. Memory holds one recording, compressed.
    """
    with storage.create(f"{corpus_path}/{layout.audio_shard(shard)}") as stream:
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as tar:
            return _tables(shard, utterances, checks, segments, partial(_add_utterance, tar))


def index_shard(
    shard: str, utterances: Iterable[RawUtterance | Rejected], *, checks: Checks, segments: Segments | None = None
) -> ShardTables:
    """The same tables for a tar that is there already; its utterances say at which byte they lie."""
    return _tables(shard, utterances, checks, segments, lambda utterance: utterance.offset)


def _tables(
    shard: str,
    utterances: Iterable[RawUtterance | Rejected],
    checks: Checks,
    segments: Segments | None,
    place: Callable[[RawUtterance], int | None],
) -> ShardTables:
    """Examines utterances one by one; those that may enter are put in their `place`, which gives their offset."""
    rows: list[dict] = []
    rejected: list[Rejected] = []
    ids: set[str] = set()
    contents: dict[bytes, str] = {}
    cutter = Cutter(segments, checks) if segments else None
    for utterance in utterances:
        if isinstance(utterance, Rejected):
            rejected.append(utterance)
            continue
        name = utterance.utterance_id
        try:
            _check_name(name)
            _refuse_taken(ids, [name], shard)
            if checks.require_text and utterance.text is None:
                raise AudioError("no_text", "there is no transcript, and corpus.checks.require_text asks for one")
            found, left_out = _utterances(utterance, checks, cutter)
            names, digests = [row["utterance_id"] for row in found], [row["digest"] for row in found]
            _refuse_taken(ids, names, shard)
            repeated = (
                next((digest for digest in digests if digest in contents), None) if checks.reject_duplicates else None
            )
            if repeated:
                raise AudioError("duplicate_content", f"the samples of '{contents[repeated]}' in shard {shard}")
        except AudioError as error:
            rejected.append(Rejected(name if is_text(name) else repr(name), error.reason, error.detail))
            continue
        if left_out:
            rejected.append(Rejected(name, "short_pieces", left_out))
        ids |= {name, *names}
        contents |= dict(zip(digests, names, strict=True))
        offset = place(utterance)
        rows += [row | {"shard": shard, "offset": offset} for row in found]
    return ShardTables(
        pa.Table.from_pylist(rows, schema=schemas.MANIFEST),
        pa.Table.from_pylist([asdict(row) for row in rejected], schema=schemas.QUARANTINE),
    )


def is_text(name: str) -> bool:
    """False for what was not UTF-8 when it was read: no table could hold it."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _check_name(name: str) -> None:
    """An id names a member of a tar that someone may unpack one day."""
    if not is_text(name):
        raise AudioError("bad_name", f"{name!r} is not UTF-8")
    if not name.isprintable() or any(part in ("", ".", "..") for part in name.split("/")):
        raise AudioError("bad_name", f"{name!r} cannot be an id: it would be no plain path below a folder")


def _refuse_taken(ids: set[str], names: list[str], shard: str) -> None:
    for name in names:
        if name in ids:
            raise AudioError("duplicate_id", f"'{name}' occurs twice in shard {shard}")


def _utterances(recording: RawUtterance, checks: Checks, cutter: Cutter | None) -> tuple[list[dict], str]:
    """(manifest rows of a recording but for its place in the tar, what was left out of it). Raises AudioError."""
    name, text = recording.utterance_id, recording.text
    if cutter is None or not cutter.is_long(recording.audio):
        known = audio.examine(recording.audio, checks)
        fields = {"utterance_id": name, "sample_rate_hz": known.rate, "digest": known.digest, "text": text}
        return [_row(recording, 0, known.samples, **fields, **WHOLE)], ""
    cut = cutter.cut(recording.audio, recording.speech)
    text = text if len(cut.pieces) == 1 and not cut.left_out else None
    if checks.require_text and text is None:
        raise AudioError(
            "no_text", "it had to be cut, which a transcript cannot be; corpus.checks.require_text asks for one"
        )
    rows = [
        _row(
            recording,
            piece.start,
            piece.end,
            utterance_id=name + piece.suffix,
            sample_rate_hz=piece.rate,
            digest=piece.digest,
            text=text,
            first=piece.first,
            stored_samples=piece.stored_samples,
            speech_share=piece.speech_share,
        )
        for piece in cut.pieces
    ]
    return rows, cut.left_out


def _row(recording: RawUtterance, start: int, end: int, **fields: Any) -> dict:
    """The utterance from `start` to `end` of its recording, samples at 16 kHz."""
    phones = None
    if recording.phones is not None:
        phones = [
            {"start": max(first, start) - start, "end": min(last, end) - start, "phone": phone}
            for first, last, phone in recording.phones
            if first < end and last > start
        ]
    return {
        "speaker": recording.speaker,
        "split": recording.split,
        "size": len(recording.audio),
        "samples": end - start,
        "phones": phones,
    } | fields


def _add_utterance(tar: tarfile.TarFile, utterance: RawUtterance) -> int:
    offset = _add(tar, f"{utterance.utterance_id}.{utterance.suffix}", utterance.audio)
    if utterance.text is not None:
        _add(tar, f"{utterance.utterance_id}.txt", utterance.text.encode())
    return offset


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Appends a member and returns the byte offset of its content inside the tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return tar.offset - padded


class Manifest:
    """Utterances with all that is known of them, columnar: rows of one manifest part, or chosen rows of several."""

    def __init__(self, table: pa.Table):
        self.table = table.combine_chunks()

    @classmethod
    def read(
        cls,
        storage: Storage,
        corpus_path: str,
        shards: Iterable[str],
        columns: list[str] | None = None,
        where: pc.Expression | None = None,
    ) -> Manifest:
        """The rows of some shards, part by part; of each part only those `where` says are kept."""
        parts = [schemas.MANIFEST.empty_table().select(columns or schemas.MANIFEST.names)]
        for shard in shards:
            part = schemas.decode(storage.read(f"{corpus_path}/{layout.manifest_part(shard)}"), columns)
            parts.append(part if where is None else part.filter(where))
        return cls(pa.concat_tables(parts))

    @classmethod
    def read_shard(cls, storage: Storage, corpus_path: str, shard: str) -> Manifest:
        return cls.read(storage, corpus_path, [shard])

    def __len__(self) -> int:
        return self.table.num_rows

    def where(self, condition: pa.Array | pa.ChunkedArray) -> Manifest:
        return Manifest(self.table.filter(condition))

    def split(self, name: str) -> Manifest:
        return self.where(pc.equal(self.table["split"], name))

    def transcribed(self) -> Manifest:
        return self.where(pc.is_valid(self.table["text"]))

    def numbers(self, column: str) -> np.ndarray:
        return self.table[column].to_numpy()

    def shard_of(self, row: int) -> str:
        """Name of the shard that holds a row."""
        return self.table["shard"][row].as_py()

    def shards(self) -> list[str]:
        """Names of the shards, sorted."""
        return sorted(pc.unique(self.table["shard"]).to_pylist())


def draw_share(utterances: int, share: float, seed: int, shard: str) -> np.ndarray:
    """Rows of a share of a shard's utterances, rounded up, drawn without replacement; ascending."""
    rng = np.random.default_rng([seed, zlib.crc32(shard.encode())])
    return np.sort(rng.choice(utterances, size=int(np.ceil(share * utterances)), replace=False))


class AudioReader:
    """Reads manifest rows by range of their shards, in any number of threads at once, and decodes them in threads of its own.

    Decoding of whole recordings is held to the processors of the worker, which Ray names in OMP_NUM_THREADS: on a machine
    that trains on its CPUs it takes no more than one step's thread does. Ranges of long ones wait for storage while they
    decode, and are not. Shards stay open, few of them but on S3, where an open file is its size and no more; what counts is
    where the shard lies, which may be elsewhere than its corpus. Ranges of remote shards are taken from and left in
    `storage.cache`, if there is one.
    """

    def __init__(self, storage: Storage, corpus_path: str, keep_open: int | None = None):
        self._storage = storage
        self._corpus_path = corpus_path
        self._few = _Kept(keep_open or 32, OrderedDict())
        self._many = _Kept(keep_open or 4096, OrderedDict())
        self._elsewhere: dict[str, Storage] = {}  # by the address in the locations
        self._locations: Locations | None = None  # read when the first shard is opened
        self._lock = threading.Lock()
        cpus = os.environ.get("OMP_NUM_THREADS", "")
        decoders = max(1, int(cpus) if cpus.isdigit() else os.cpu_count() or 1)
        self._decoders = ThreadPoolExecutor(decoders, thread_name_prefix="decode")

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Raises CorpusError where the shard is missing or shorter than its manifest says."""
        opened = self._open(shard)
        key = f"{opened.key}:{offset}:{size}"
        data = opened.cache.get(key) if opened.cache else None
        if data is not None:
            return data
        data = opened.file.read_at(size, offset)
        if len(data) != size:
            raise CorpusError(
                f"shard '{shard}' ends at byte {offset + len(data)}; its manifest has audio up to byte {offset + size}. "
                "The shard was cut short or replaced: remove the corpus and run prepare_data again."
            )
        if opened.cache:
            opened.cache.put(key, data)
        return data

    def _open(self, shard: str) -> _OpenShard:
        """The shard's file. One that falls out is closed when the last thread is done with it."""
        with self._lock:
            storage, path = self._place(shard)
            kept = self._many if storage.opens_cheaply else self._few
            if shard in kept.shards:
                kept.shards.move_to_end(shard)
                return kept.shards[shard]
        cache = None if storage.is_local else storage.cache
        try:
            # What a range is kept under says which state of the shard it is of: a corpus may be made anew in its place.
            key = f"{storage.url}/{path}:{storage.version(path)}" if cache else ""
            opened = _OpenShard(storage.open(path), cache, key)
        except FileNotFoundError as error:
            way_out = (
                "remove the corpus and run prepare_data again"
                if storage is self._storage
                else f"if the tars have moved, write where they are now into {self._corpus_path}/{layout.LOCATIONS}"
            )
            raise CorpusError(f"'{path}' is missing from {storage.url}: {way_out}") from error
        with self._lock:
            kept.shards[shard] = opened
            if len(kept.shards) > kept.limit:
                kept.shards.popitem(last=False)
        return opened

    def _place(self, shard: str) -> tuple[Storage, str]:
        """Where a shard's tar lies."""
        if self._locations is None:
            file = f"{self._corpus_path}/{layout.LOCATIONS}"
            known = self._storage.read(file) if self._storage.exists(file) else b'{"tars": {}}'
            self._locations = msgspec.json.decode(known, type=Locations)
        if shard not in self._locations.tars:
            return self._storage, f"{self._corpus_path}/{layout.audio_shard(shard)}"
        root, path = self._locations.tars[shard]
        if root not in self._elsewhere:
            self._elsewhere[root] = Storage(root, self._storage.cache)
        return self._elsewhere[root], path

    def wave(self, shard: str, offset: int, size: int, first: int = 0, stored_samples: int = -1) -> np.ndarray:
        """The decoded 16 kHz waveform of an utterance, shape (S,): of the whole recording, or of a range of its stored samples."""
        if stored_samples == -1:
            try:
                return self._decoders.submit(audio.decode, self.read(shard, offset, size)).result()
            except AudioError as error:
                raise CorpusError(
                    f"shard '{shard}', bytes {offset} to {offset + size}: {error}. When the corpus was made this could be "
                    "decoded: the shard was altered or damaged. Remove the corpus and run prepare_data again."
                ) from error
        window = Window(lambda start, count: self.read(shard, offset + start, count), size)
        try:
            wave_S = audio.decode_range(window, first, stored_samples)
        except AudioError:
            if not window.failure:
                raise
        if window.failure:  # what the decoder takes for the file's end or for damage is storage that did not answer
            raise window.failure
        return wave_S


@dataclass(frozen=True)
class _Kept:
    """Shards that are open, the one that was used last at the end."""

    limit: int
    shards: OrderedDict[str, _OpenShard]


@dataclass(frozen=True)
class _OpenShard:
    file: pa.NativeFile
    cache: RangeCache | None  # None for a local one
    key: str  # of the shard as it is now, for the cache
