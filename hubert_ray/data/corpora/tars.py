"""Which recordings lie in WebDataset tars? They are indexed where they are: a member of a tar is a byte range already.

Members of one recording follow each other and share a key, their name without its suffix: `<key>.flac` (or another audio
suffix), `<key>.txt` and `<key>.json` with `text` and `speaker`, the last two where there. Each tar is a shard. Headers and
members are read in one pass with ranged reads of 1 MiB; nothing is unpacked, so a name is never a path, yet names that
would be dangerous as one are refused.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from hubert_ray.config.recipe import WebDataset
from hubert_ray.data.corpora.source import MAX_BYTES, SUFFIXES, Group, Placed, one_line
from hubert_ray.data.shards import RawUtterance, Rejected
from hubert_ray.errors import CorpusError

BUFFER = 2**20  # bytes of one read
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


class WebDatasetSource(Placed):
    """Tars below a folder, or one. A group is a tar; an id is the tar's path and the key, since keys often start anew."""

    shard_bytes = 0

    def __init__(self, corpus: WebDataset):
        super().__init__(corpus, "a folder of .tar files, or one")

    def groups(self) -> list[Group]:
        sizes = self.files((".tar", *PACKED))
        packed = [name for name in sizes if name.endswith(PACKED)]
        if packed:
            raise CorpusError(
                f"'{packed[0]}' is compressed: a recording in it is no byte range. Unpack the tars themselves (gunzip, unzstd …); "
                "what is in them is compressed audio, which packs no smaller"
            )
        if not sizes:
            raise CorpusError(f"'{self.storage.url}' holds no .tar files")
        # Who speaks is in the tars: one that may hold moved speakers is read once for each split, and some of those come out empty.
        return [
            Group(name, split, size)
            for name, size in sizes.items()
            for split in sorted({self.split(name, ""), *self.moved.values()})
        ]

    def read(self, group: Group) -> Iterator[RawUtterance | Rejected]:
        for found in self._found(group.name):
            # What was set aside belongs to the split of its tar.
            if (found.split if isinstance(found, RawUtterance) else self.split(group.name, "")) == group.split:
                yield found

    def _found(self, tar_name: str) -> Iterator[RawUtterance | Rejected]:
        together: list[_Member] = []
        for member in self._members(tar_name):
            if isinstance(member, Rejected):
                yield member
                continue
            if together and member.key != together[0].key:
                yield from self._utterances(tar_name, together)
                together = []
            together.append(member)
        if together:
            yield from self._utterances(tar_name, together)

    def _members(self, tar_name: str) -> Iterator[_Member | Rejected]:
        with self.storage.open(tar_name) as native:
            file = io.BufferedReader(native, BUFFER)  # type: ignore[arg-type]  # a raw file in all that is asked of it
            packed = COMPRESSED.get(file.peek(2)[:2])
            if packed:
                raise CorpusError(
                    f"'{tar_name}' is compressed ({packed}) in spite of its name; unpack it to a plain tar"
                )
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while (info := tar.next()) is not None:
                        tar.members.clear()  # type: ignore[attr-defined]  # of what has been read, which would grow with the tar
                        yield from _read(info, file, tar_name)
                    tail = native.read_at(tarfile.BLOCKSIZE, tar.offset)
                    if any(tail):
                        raise tarfile.ReadError(f"there is no header at byte {tar.offset}")
                    if len(tail) < tarfile.BLOCKSIZE:
                        raise tarfile.ReadError(f"it ends at byte {tar.offset + len(tail)} without the mark of its end")
            except tarfile.ReadError as error:
                yield Rejected(tar_name, "bad_tar", f"{error}; what came before is used")

    def _utterances(self, tar_name: str, members: list[_Member]) -> Iterator[RawUtterance | Rejected]:
        """The recordings under one key: one, as a rule."""
        utterance_id = f"{tar_name.removesuffix('.tar')}/{members[0].key}"
        text, speaker = None, ""
        for member in members:
            try:
                if member.suffix == "txt":
                    text = one_line(member.data.decode("utf-8-sig"))
                elif member.suffix == "json":
                    told = msgspec.json.decode(member.data, type=_Told)
                    text, speaker = text or one_line(told.text), str(told.speaker)
            except (UnicodeDecodeError, msgspec.DecodeError) as error:
                reason = "bad_transcript" if member.suffix == "txt" else "bad_metadata"
                yield Rejected(utterance_id, reason, f".{member.suffix}: {error}; the audio is used without it")
        recordings = [member for member in members if f".{member.suffix}" in SUFFIXES]
        for member in recordings:
            split = self.split(tar_name, speaker)
            yield RawUtterance(utterance_id, speaker, split, member.suffix, member.data, text, offset=member.offset)
        if not recordings:
            yield Rejected(
                utterance_id, "no_audio", f"the key has {', '.join(m.suffix for m in members)} but no recording"
            )


@dataclass(frozen=True)
class _Member:
    key: str
    suffix: str
    data: bytes
    offset: int  # of the data in the tar


class _Told(msgspec.Struct):
    """What is used of a key's JSON."""

    text: str | None = None
    speaker: str | int = ""


def _read(info: tarfile.TarInfo, file: io.BufferedReader, tar_name: str) -> Iterator[_Member | Rejected]:
    """The member, where it is of use. Raises tarfile.ReadError where the tar ends within it."""
    key, suffix = posixpath.splitext(info.name.removeprefix("./"))
    wanted = suffix.lower() in SUFFIXES or suffix in (".txt", ".json")
    if info.isdir() or not wanted:
        return
    if not info.isreg() or info.issparse():
        yield Rejected(
            f"{tar_name}: {info.name!r}", "not_a_file", "a link, device or sparse file; only plain members are read"
        )
    elif info.size > MAX_BYTES:
        yield Rejected(f"{tar_name}: {info.name!r}", "too_large", f"{info.size} bytes, at most {MAX_BYTES}")
    else:
        file.seek(info.offset_data)
        data = file.read(info.size)
        if len(data) < info.size:
            raise tarfile.ReadError(f"{info.name!r} ends after {len(data)} of {info.size} bytes")
        yield _Member(key, suffix[1:].lower(), data, info.offset_data)
