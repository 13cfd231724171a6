"""What is a source of recordings, and what do those share that lie in a folder or a bucket?"""

from __future__ import annotations

import errno
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from hubert_ray.config.recipe import AudioFolder, AudioTable, LibriSpeech, Parquet, WebDataset
from hubert_ray.data.shards import RawUtterance, Rejected, is_text
from hubert_ray.errors import AudioError, CorpusError, StorageError
from hubert_ray.storage.filesystem import Storage

SPLITS = ("train", "dev", "test")
SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3")  # of files and tar members that are recordings
MAX_BYTES = 2**31  # of a recording, which is held in memory while it is examined: 18 h of 16-bit PCM at 16 kHz

_SPLIT_NAMES = {split: split for split in SPLITS} | dict.fromkeys(("val", "valid", "validation"), "dev")
_OWN_FAULTS = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR}


@dataclass(frozen=True)
class Group:
    """Some utterances of one split that are read together."""

    name: str
    split: str  # of all; where a file holds several splits, each is a group of it, and `read` passes over the others
    bytes: int  # of audio, roughly; only used to fill shards evenly
    digest: str = ""  # of its files' names, where the group is a stretch of a folder's list


class Source(Protocol):
    """A corpus as it lies somewhere or comes out of a synthesiser."""

    shard_bytes: (
        int  # a new shard is begun at this size; 0: a group is a tar that is a shard already and stays where it is
    )

    def groups(self) -> list[Group]: ...

    def read(self, group: Group) -> Iterator[RawUtterance | Rejected]: ...


class Placed:
    """A source below `corpus.path`: a folder, s3://… or gs://… URL, or (`name`) a file in it."""

    def __init__(self, corpus: LibriSpeech | AudioFolder | AudioTable | Parquet | WebDataset, expected: str):
        try:
            self.storage, self.name = Storage.of(corpus.path)
        except StorageError as error:
            raise CorpusError(f"corpus.path: {error}; expected {expected}") from error
        self.moved = dict.fromkeys(corpus.dev_speakers, "dev") | dict.fromkeys(corpus.test_speakers, "test")

    def split(self, subset: str, speaker: str) -> str:
        """Where an utterance belongs: train, where neither its speaker nor a part of its subset's path says otherwise."""
        return self.moved.get(speaker) or next(filter(None, map(split_of, subset.split("/"))), "train")

    def check_moved(self, speakers: set[str]) -> None:
        """Raises CorpusError where a moved speaker is not among those that the corpus has."""
        absent = sorted(self.moved.keys() - speakers)
        if absent:
            raise CorpusError(
                f"corpus.dev_speakers and corpus.test_speakers name {', '.join(absent)}, but '{self.storage.url}' has no "
                "such speaker; give the names as the corpus has them"
            )

    def files(self, suffixes: tuple[str, ...]) -> dict[str, int]:
        """Path -> bytes of the files that end so: all below the folder, or the one file that the corpus is.

        Raises CorpusError where the name of one is not UTF-8, since nothing could name what is in it.
        """
        named = [("", {self.name: self.storage.size(self.name)})] if self.name else self.storage.walk()
        found = {
            posixpath.join(folder, name): size
            for folder, sizes in named
            for name, size in sizes.items()
            if name.endswith(suffixes)
        }
        unnamed = next((path for path in found if not is_text(path)), None)
        if unnamed:
            raise CorpusError(f"'{self.storage.url}': the name of the file {unnamed!r} is not UTF-8; rename it")
        return found

    def recording(self, path: str) -> bytes:
        """A whole file. Raises AudioError where the file is to blame; an OSError is the storage's, and worth another try."""
        if not is_text(path):
            raise AudioError("bad_name", f"{path!r}: the file's name is not UTF-8")
        try:
            with self.storage.open(path) as file:
                if file.size() > MAX_BYTES:
                    raise AudioError("too_large", f"'{path}' has {file.size()} bytes, at most {MAX_BYTES}")
                return file.read()
        except FileNotFoundError as error:
            raise AudioError("no_audio", f"there is no '{path}'") from error
        except pa.ArrowInvalid as error:
            raise AudioError("bad_name", f"{path!r}: {error}") from error
        except OSError as error:
            if error.errno in _OWN_FAULTS or self.storage.is_folder(path):
                raise AudioError("unreadable", f"'{path}' is a folder or may not be read") from error
            raise

    def text(self, path: str) -> str:
        """A whole text file. Raises AudioError("bad_transcript") where it is not UTF-8."""
        try:
            return self.recording(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise AudioError(
                "bad_transcript", f"'{path}' is not UTF-8 ({error}); the audio is used without text"
            ) from None


def split_of(name: str) -> str | None:
    """The split that a name begins with, such as dev of `dev-clean`, `validation-00000.parquet` or `dev`; None for none."""
    return _SPLIT_NAMES.get(re.split(r"[-_.]", name, maxsplit=1)[0])


def one_line(text: str | None) -> str | None:
    """A transcript with single spaces; None where nothing is left."""
    return " ".join(text.split()) or None if text else None
