"""When is which phone spoken? Phone times of a corpus, in whichever of the usual formats lies in one place.

`alignments = <path>` in a corpus's settings names one of these, on a disk or in a bucket; the format is found by what lies there.

* A folder with the same tree as the recordings, one file for each, which may be the recordings' own folder:
  `<recording>.TextGrid`, Praat's long or short text form, as the Montreal Forced Aligner writes it: the interval tier `phones`
  (or `<speaker> - phones`); or `<recording>.phn`, TIMIT's form: lines `start end phone` in samples at 16 kHz.
* A CTM file, or a folder of `*.ctm` files, as Kaldi and NIST's tools write them: lines `<utterance id> <channel> <start s>
  <duration s> <phone> [confidence]`, those of an utterance together and in order; `;;` begins a comment. Kaldi's position suffixes
  (`AH_B`, `_I`, `_E`, `_S`) are taken off.

Convention for silence, which holds for all of them: silence is a class like any phone and counts in every measure of quality
(HuBERT (Hsu et al. 2021) IV-E). An interval without text, `sil`, `sp` and `<eps>` become `SIL`; noises (`spn`, `+NSN+` …) keep
the names that their aligner gave them, and so do phones, whose stress digits units/quality.py takes off. Time that no interval
covers is not counted.

What cannot be read costs an utterance its phones, and is told in the quarantine table; the audio is used.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import pyarrow as pa

from hubert_ray.data.frames import SAMPLE_RATE
from hubert_ray.data.shards import Rejected
from hubert_ray.errors import CorpusError, StorageError
from hubert_ray.storage.filesystem import Storage

SILENCE = "SIL"
_ALSO_SILENCE = ("", "sil", "sp", "<eps>")
_TIER = "phones"

Phones = list[tuple[int, int, str]]  # [start, end) in 16 kHz samples, and the phone


class _Format(Protocol):
    def phones(self, place: str, utterance_id: str) -> Phones | None:
        """None where there is no alignment of the utterance. Raises ValueError where it cannot be used."""
        ...


class Alignments:
    """The phone times of one corpus; of a corpus without any where `path` is None."""

    def __init__(self, path: str | None):
        """Raises CorpusError where nothing that is known lies at `path`."""
        self._format = _open(path) if path is not None else None

    def read(self, place: str, utterance_id: str) -> tuple[Phones | None, Rejected | None]:
        """(phones, what to put into quarantine) of the recording at `place`, its path below the corpus without suffix."""
        if self._format is None:
            return None, None
        try:
            phones = self._format.phones(place, utterance_id)
            return (None if phones is None else _checked(phones)), None
        except (ValueError, PermissionError) as error:
            return None, Rejected(utterance_id, "bad_alignment", f"{error}; the audio is used without phones")


def _open(path: str) -> _Format:
    try:
        storage, file = Storage.of(path)
    except StorageError as error:
        raise CorpusError(f"corpus.alignments: {error}; expected a folder or a CTM file of phone times") from error
    ctm = [file] if file else [name for name in storage.scan("")[0] if name.lower().endswith(".ctm")]
    if ctm:
        return _Ctm(storage, ctm)
    if not any(name.lower().endswith(_Tree.SUFFIXES) for _, files in storage.walk() for name in files):
        raise CorpusError(
            f"corpus.alignments: '{path}' holds no phone times; expected <recording>.TextGrid or <recording>.phn files in the "
            "same tree as the recordings, or *.ctm files"
        )
    return _Tree(storage)


def _checked(phones: Phones) -> Phones:
    """The same phones with one name for silence."""
    times = [time for start, end, _ in phones for time in (start, end)]
    if not times:
        raise ValueError("no phone in it")
    if times != sorted(times) or not 0 <= times[0] <= times[-1] < 2**31:
        raise ValueError("times must rise from 0 on, and no two phones overlap")
    return [(start, end, SILENCE if name.lower() in _ALSO_SILENCE else name) for start, end, name in phones]


def _samples(seconds: float) -> int:
    if not abs(seconds) < 2**31 / SAMPLE_RATE:  # of infinity and NaN too
        raise ValueError(f"{seconds} is no time in seconds")
    return round(seconds * SAMPLE_RATE)


# --- one file per recording -------------------------------------------------------------------------------------------


class _Tree:
    """Files beside or in the tree of the recordings."""

    SUFFIXES = (".textgrid", ".phn")

    def __init__(self, storage: Storage):
        self._storage = storage
        self._folder: tuple[str | None, dict[str, str]] = (None, {})

    def phones(self, place: str, utterance_id: str) -> Phones | None:
        folder, stem = posixpath.split(place)
        if self._folder[0] != folder:
            self._folder = folder, self._names(folder)  # recordings come folder by folder
        for suffix in self.SUFFIXES:
            name = self._folder[1].get(stem + suffix)
            if name is not None:
                data = self._storage.read(posixpath.join(folder, name))
                try:
                    return timit_phones(data) if suffix == ".phn" else textgrid_phones(data)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        return None

    def _names(self, folder: str) -> dict[str, str]:
        """The alignments of a folder, by their names with the suffix in small letters."""
        parts = {name: posixpath.splitext(name) for name in self._storage.scan(folder)[0]}
        return {
            stem + suffix.lower(): name for name, (stem, suffix) in parts.items() if suffix.lower() in self.SUFFIXES
        }


def timit_phones(data: bytes) -> Phones:
    """The phones of a `.phn` file. Raises ValueError for anything but lines of `start end phone`."""
    rows = [line.split() for line in data.decode().splitlines() if line.strip()]
    return [(int(start), int(end), phone) for start, end, phone in rows]


# What counts in a Praat text file: strings, flags and free-standing numbers. Whatever else stands there (`xmin =`,
# `intervals [3]:`, comments from `!` on) is for the human reader, which is all that parts the long form from the short one.
_PRAAT_TOKEN = re.compile(r'"((?:[^"]|"")*)"|!.*|([^\s"]+)')
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def textgrid_phones(data: bytes) -> Phones:
    """The intervals of the tier `phones` of a Praat TextGrid in UTF-8 or UTF-16.

    Source: the Praat manual, "TextGrid file formats". Raises ValueError where the file is no TextGrid, ends too early, or
    has no such tier or several.
    """
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    tokens = _PraatTokens(text)
    if tokens.string() not in ("ooTextFile", "ooTextFile short") or tokens.string() != "TextGrid":
        raise ValueError('not a TextGrid in text form: expected File type = "ooTextFile", Object class = "TextGrid"')
    tokens.numbers(2)  # start and end of the whole
    tiers: dict[str, list[Phones]] = {}
    for _ in range(tokens.count()):
        kind, name = tokens.string(), tokens.string()
        tokens.numbers(2)
        intervals: Phones = []
        for _ in range(tokens.count()):
            if kind == "IntervalTier":
                start, end = tokens.numbers(2)
                intervals.append((_samples(start), _samples(end), tokens.string().strip()))
            else:  # of points
                tokens.numbers(1)
                tokens.string()
        if kind == "IntervalTier":
            tiers.setdefault(name, []).append(intervals)
    found = [tier for name, same in tiers.items() for tier in same if name == _TIER or name.endswith(f" - {_TIER}")]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} interval tiers named '{_TIER}', expected one; it has {', '.join(tiers) or 'none'}"
        )
    return found[0]


class _PraatTokens:
    """The strings and numbers of a Praat text file in turn."""

    def __init__(self, text: str):
        found = ((match[1], match[2]) for match in _PRAAT_TOKEN.finditer(text))
        self._tokens = iter(
            [
                string.replace('""', '"') if string is not None else float(word)
                for string, word in found
                if string is not None or (word is not None and _NUMBER.fullmatch(word))
            ]
        )

    def string(self) -> str:
        token = next(self._tokens, None)
        if not isinstance(token, str):
            raise ValueError(f"found {'the end' if token is None else token}, expected a string in quotes")
        return token

    def numbers(self, count: int) -> list[float]:
        tokens = [next(self._tokens, None) for _ in range(count)]
        for token in tokens:
            if not isinstance(token, float):
                raise ValueError(f"found {'the end' if token is None else repr(token)}, expected a number")
        return [token for token in tokens if isinstance(token, float)]

    def count(self) -> int:
        number = self.numbers(1)[0]
        if number < 0 or number != int(number):
            raise ValueError(f"found {number}, expected how many tiers or intervals follow")
        return int(number)


# --- one file for many ------------------------------------------------------------------------------------------------


class _Ctm:
    """CTM files, read by range: gone through once, when the first utterance is asked for; where the lines of each are is kept."""

    def __init__(self, storage: Storage, files: list[str]):
        self._storage, self._files = storage, files
        self._opened: tuple[int, pa.NativeFile] | None = None  # the file that was read last; neighbours are in one file

    def phones(self, place: str, utterance_id: str) -> Phones | None:
        runs = self._runs(utterance_id.encode())
        if not runs:
            return None
        file, lines = runs[0]
        if len(runs) > 1:
            raise ValueError(f"{file}: the lines of '{utterance_id}' do not stand together")
        try:
            return ctm_phones(lines)
        except ValueError as error:
            raise ValueError(f"{file}, '{utterance_id}': {error}") from error

    def _runs(self, name: bytes) -> list[tuple[str, list[bytes]]]:
        """(file, lines) of the runs of lines that begin with `name`; one of them, where the files are in order."""
        index, found = self._index, []
        first, last = (np.searchsorted(index.hash_R, np.uint64(_hash(name)), side) for side in ("left", "right"))
        for run in range(first, last):
            number, start, end = (int(column[run]) for column in (index.file_R, index.start_R, index.end_R))
            if self._opened is None or self._opened[0] != number:
                self._opened = number, self._storage.open(self._files[number])
            lines = [line for line in self._opened[1].read_at(end - start, start).splitlines() if _name(line)]
            if lines and _name(lines[0]) == name:  # and not another one of the same hash
                found.append((self._files[number], lines))
        return found

    @cached_property
    def _index(self) -> _Index:
        hashes, numbers, starts, ends = array("Q"), array("q"), array("q"), array("q")
        for number, file in enumerate(self._files):
            current, position = b"", 0
            with io.BufferedReader(self._storage.open(file), 2**20) as stream:  # type: ignore[arg-type]  # it reads into buffers
                for line in stream:
                    name = _name(line)
                    if name and name != current:
                        current = name
                        hashes.append(_hash(name))
                        numbers.append(number)
                        starts.append(position)
                        ends.append(position)
                    position += len(line)
                    if name:
                        ends[-1] = position
        order = np.argsort(np.frombuffer(hashes, dtype=np.uint64), kind="stable")
        return _Index(*(np.array(column)[order] for column in (hashes, numbers, starts, ends)))


def ctm_phones(lines: Iterable[bytes]) -> Phones:
    """The phones of one utterance's lines. Raises ValueError for other columns, times that are none, or two channels."""
    rows = [line.decode().split() for line in lines]
    if any(len(row) not in (5, 6) for row in rows):
        raise ValueError("expected lines of utterance, channel, start, duration, phone and, if need be, a confidence")
    if len({row[1] for row in rows}) > 1:
        raise ValueError("more than one channel; give each channel an utterance id of its own")
    return [
        (_samples(float(start)), _samples(float(start) + float(duration)), re.sub("_[BIES]$", "", phone))
        for _, _, start, duration, phone, *_ in rows
    ]


@dataclass(frozen=True)
class _Index:
    """Where runs of lines of one utterance are, sorted by a hash of its id: numbers only, 32 bytes a run."""

    hash_R: np.ndarray  # uint64
    file_R: np.ndarray  # its number
    start_R: np.ndarray  # bytes
    end_R: np.ndarray


def _name(line: bytes) -> bytes:
    """The utterance id of a line; nothing for a comment or an empty line."""
    return b"" if line.startswith(b";;") else next(iter(line.split(None, 1)), b"")


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())
