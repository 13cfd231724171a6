"""How is a corpus stored, and how is one utterance read back?

A corpus is a folder of uncompressed tar shards in WebDataset's form (`<key>.flac`, `<key>.txt`) holding the original
compressed audio, and a manifest with one row per utterance. Because a tar member is a plain byte range, any utterance is
one ranged read away; nothing is ever unpacked.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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


def write_shard(
    storage: Storage, corpus_path: str, shard: str, utterances: Iterable[RawUtterance | Rejected]
) -> ShardTables:
    """Writes one tar and returns its manifest rows and its quarantine rows. The tar's bytes depend on its input only."""
    rows: list[dict] = []
    rejected: list[Rejected] = []
    seen: set[str] = set()
    with storage.create(f"{corpus_path}/{layout.audio_shard(shard)}") as stream:
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as tar:
            for utterance in utterances:
                if isinstance(utterance, Rejected):
                    rejected.append(utterance)
                    continue
                name = utterance.utterance_id
                try:
                    if name in seen:
                        raise AudioError("duplicate_id", f"'{name}' occurs twice in shard {shard}")
                    samples, rate = audio.examine(utterance.audio)
                except AudioError as error:
                    rejected.append(Rejected(name, error.reason, error.detail))
                    continue
                seen.add(name)
                offset = _add(tar, f"{name}.{utterance.suffix}", utterance.audio)
                if utterance.text is not None:
                    _add(tar, f"{name}.txt", utterance.text.encode())
                rows.append(_row(utterance, shard, offset, samples, rate))
    return ShardTables(
        pa.Table.from_pylist(rows, schema=schemas.MANIFEST),
        pa.Table.from_pylist([asdict(row) for row in rejected], schema=schemas.QUARANTINE),
    )


def _row(utterance: RawUtterance, shard: str, offset: int, samples: int, rate: int) -> dict:
    phones = utterance.phones
    return {
        "utterance_id": utterance.utterance_id,
        "speaker": utterance.speaker,
        "split": utterance.split,
        "shard": shard,
        "offset": offset,
        "size": len(utterance.audio),
        "samples": samples,
        "sample_rate_hz": rate,
        "text": utterance.text,
        "phones": None if phones is None else [{"start": s, "end": e, "phone": p} for s, e, p in phones],
    }


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

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Raises CorpusError where the shard is missing or shorter than its manifest says."""
        file = self._files.pop(shard, None)
        if file is None:
            path = f"{self._corpus_path}/{layout.audio_shard(shard)}"
            try:
                file = self._storage.open(path)
            except FileNotFoundError as error:
                raise CorpusError(
                    f"'{path}' is missing from {self._storage.url}: remove the corpus and run prepare_data again"
                ) from error
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

    def wave(self, shard: str, offset: int, size: int) -> np.ndarray:
        """The decoded 16 kHz waveform, shape (S,)."""
        return audio.decode(self.read(shard, offset, size))
