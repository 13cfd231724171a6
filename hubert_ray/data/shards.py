"""How is a corpus stored, and how is one utterance read back?

A corpus is a folder of uncompressed tar shards in WebDataset's form (`<key>.flac`, `<key>.txt`) holding the original
compressed audio, and a manifest with one row per utterance. Because a tar member is a plain byte range, any utterance is
one ranged read away; nothing is ever unpacked. Tars that were WebDataset shards before stay where they are: the manifest's
ranges point into them, and `locations.json` says where they lie, which may change without the corpus being another.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hubert_ray.config.recipe import Checks
from hubert_ray.data import audio
from hubert_ray.errors import AudioError, CorpusError
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage


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
) -> ShardTables:
    """Writes one tar and returns its manifest rows and its quarantine rows. The tar's bytes depend on its input only."""
    with storage.create(f"{corpus_path}/{layout.audio_shard(shard)}") as stream:
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as tar:
            return _tables(shard, utterances, checks, partial(_add_utterance, tar))


def index_shard(shard: str, utterances: Iterable[RawUtterance | Rejected], *, checks: Checks) -> ShardTables:
    """The same tables for a tar that is there already; its utterances say at which byte they lie."""
    return _tables(shard, utterances, checks, lambda utterance: utterance.offset)


def _tables(
    shard: str,
    utterances: Iterable[RawUtterance | Rejected],
    checks: Checks,
    place: Callable[[RawUtterance], int | None],
) -> ShardTables:
    """Examines utterances one by one; those that may enter are put in their `place`, which gives their offset."""
    rows: list[dict] = []
    rejected: list[Rejected] = []
    ids: set[str] = set()
    contents: dict[bytes, str] = {}
    for utterance in utterances:
        if isinstance(utterance, Rejected):
            rejected.append(utterance)
            continue
        name = utterance.utterance_id
        try:
            _check_name(name)
            if name in ids:
                raise AudioError("duplicate_id", f"'{name}' occurs twice in shard {shard}")
            if checks.require_text and utterance.text is None:
                raise AudioError("no_text", "there is no transcript, and corpus.checks.require_text asks for one")
            recording = audio.examine(utterance.audio, checks)
            if checks.reject_duplicates and recording.digest in contents:
                raise AudioError("duplicate_content", f"the samples of '{contents[recording.digest]}' in shard {shard}")
        except AudioError as error:
            rejected.append(Rejected(name if is_text(name) else repr(name), error.reason, error.detail))
            continue
        ids.add(name)
        contents[recording.digest] = name
        rows.append(_row(utterance, shard, place(utterance), recording))
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


def _row(utterance: RawUtterance, shard: str, offset: int | None, recording: audio.Recording) -> dict:
    phones = utterance.phones
    return {
        "utterance_id": utterance.utterance_id,
        "speaker": utterance.speaker,
        "split": utterance.split,
        "shard": shard,
        "offset": offset,
        "size": len(utterance.audio),
        "samples": recording.samples,
        "sample_rate_hz": recording.rate,
        "text": utterance.text,
        "phones": None if phones is None else [{"start": s, "end": e, "phone": p} for s, e, p in phones],
        "digest": recording.digest,
    }


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
    """The utterances of a corpus, columnar: Arrow for strings, numpy for numbers, no Python object per row."""

    def __init__(self, table: pa.Table):
        self.table = table.combine_chunks()

    @classmethod
    def read(cls, storage: Storage, corpus_path: str, columns: list[str] | None = None) -> Manifest:
        return cls(schemas.decode(storage.read(f"{corpus_path}/{layout.MANIFEST}"), columns))

    @classmethod
    def read_shard(cls, storage: Storage, corpus_path: str, shard: str) -> Manifest:
        return cls(schemas.decode(storage.read(f"{corpus_path}/{layout.part(shard)}")))

    def __len__(self) -> int:
        return self.table.num_rows

    def where(self, condition: pa.Array | pa.ChunkedArray) -> Manifest:
        return Manifest(self.table.filter(condition))

    def split(self, name: str) -> Manifest:
        return self.where(pc.equal(self.table["split"], name))

    def transcribed(self) -> Manifest:
        return self.where(pc.is_valid(self.table["text"]))

    def sample(self, share: float, seed: int, shard: str) -> np.ndarray:
        """Rows of a share of a shard's utterances, rounded up, drawn without replacement; ascending."""
        rng = np.random.default_rng([seed, zlib.crc32(shard.encode())])
        return np.sort(rng.choice(len(self), size=int(np.ceil(share * len(self))), replace=False))

    def numbers(self, column: str) -> np.ndarray:
        return self.table[column].to_numpy()

    def shards(self) -> list[str]:
        """Names of the shards, sorted."""
        return sorted(pc.unique(self.table["shard"]).to_pylist())


class AudioReader:
    """Reads the compressed bytes of manifest rows by range, keeping a few shards open. One per thread or process."""

    def __init__(self, storage: Storage, corpus_path: str, keep_open: int = 32):
        self._storage = storage
        self._corpus_path = corpus_path
        self._keep_open = keep_open
        self._files: OrderedDict[str, pa.NativeFile] = OrderedDict()
        self._locations: Locations | None = None  # read when the first shard is opened

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Raises CorpusError where the shard is missing or shorter than its manifest says."""
        file = self._files.pop(shard, None)
        if file is None:
            file = self._open(shard)
        self._files[shard] = file
        if len(self._files) > self._keep_open:
            self._files.popitem(last=False)[1].close()
        data = file.read_at(size, offset)
        if len(data) != size:
            raise CorpusError(
                f"shard '{shard}' ends at byte {offset + len(data)}; its manifest has audio up to byte {offset + size}. "
                "The shard was cut short or replaced: remove the corpus and run prepare_data again."
            )
        return data

    def _open(self, shard: str) -> pa.NativeFile:
        if self._locations is None:
            file = f"{self._corpus_path}/{layout.LOCATIONS}"
            known = self._storage.read(file) if self._storage.exists(file) else b'{"tars": {}}'
            self._locations = msgspec.json.decode(known, type=Locations)
        storage, path = self._storage, f"{self._corpus_path}/{layout.audio_shard(shard)}"
        way_out = "remove the corpus and run prepare_data again"
        if shard in self._locations.tars:
            root, path = self._locations.tars[shard]
            storage = Storage(root)
            way_out = f"if the tars have moved, write where they are now into {self._corpus_path}/{layout.LOCATIONS}"
        try:
            return storage.open(path)
        except FileNotFoundError as error:
            raise CorpusError(f"'{path}' is missing from {storage.url}: {way_out}") from error

    def wave(self, shard: str, offset: int, size: int) -> np.ndarray:
        """The decoded 16 kHz waveform, shape (S,)."""
        return audio.decode(self.read(shard, offset, size))
