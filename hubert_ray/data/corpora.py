"""Which recordings make up a corpus? Sources list groups of utterances; groups are packed into shards by size.

Extension point: a new source is a class with `groups()` (cheap: names and sizes only) and `read(group)` (the bytes), a
settings struct in config/recipe.py, and a line in `open_source`. A group is the smallest piece that one worker reads
alone: a chapter, a speaker. What `read` cannot use it yields as `Rejected`; the rest of the group goes on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hubert_ray.config.recipe import AudioFolder, Corpus, EmbeddedCorpus, LibriSpeech
from hubert_ray.data import synthetic
from hubert_ray.data.shards import RawUtterance, Rejected
from hubert_ray.errors import CorpusError

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Group:
    """Some utterances of one split that are read together."""

    name: str
    split: str
    bytes: int  # of audio, roughly; only used to fill shards evenly
    files: tuple[str, ...] = ()  # in it, where the name alone does not tell them


class Source(Protocol):
    """A corpus as it lies on disk or comes out of a synthesiser."""

    def groups(self) -> list[Group]: ...

    def read(self, group: Group) -> Iterator[RawUtterance | Rejected]: ...


def open_source(corpus: Corpus) -> Source:
    match corpus:
        case EmbeddedCorpus():
            return EmbeddedSource(corpus)
        case LibriSpeech():
            return LibriSpeechSource(corpus)
        case AudioFolder():
            return AudioFolderSource(corpus)


def plan_shards(groups: list[Group], shard_bytes: int) -> dict[str, list[Group]]:
    """Shard name -> its groups: each split's groups in order of their names, a new shard when one is full.

    Depends on the corpus only, so the same shards come out on any number of workers.
    """
    shards: dict[str, list[Group]] = {}
    for split in SPLITS:
        number, filled = 0, 0
        for group in sorted((g for g in groups if g.split == split), key=lambda g: g.name):
            if filled and filled + group.bytes > shard_bytes:
                number, filled = number + 1, 0
            shards.setdefault(f"{split}-{number:05d}", []).append(group)
            filled += group.bytes
    return shards


class EmbeddedSource:
    """The synthetic corpus; a group is a speaker, whose audio costs a process of its own."""

    BYTES_PER_UTTERANCE = 60_000

    def __init__(self, corpus: EmbeddedCorpus):
        self._corpus = corpus
        self._speakers = {speaker.id: speaker for speaker in synthetic.speakers(corpus)}

    def groups(self) -> list[Group]:
        size = self._corpus.utterances_per_speaker * self.BYTES_PER_UTTERANCE
        return [Group(speaker.id, speaker.split, size) for speaker in self._speakers.values()]

    def read(self, group: Group) -> Iterator[RawUtterance | Rejected]:
        for made in synthetic.synthesise(self._speakers[group.name], self._corpus):
            yield RawUtterance(made.utterance_id, made.speaker, made.split, "flac", made.flac, made.text, made.phones)


class _Tree:
    """What trees of files share: their root, and the split of a speaker."""

    def __init__(self, corpus: LibriSpeech | AudioFolder, expected: str):
        self._root = Path(corpus.path).expanduser()
        self._moved = dict.fromkeys(corpus.dev_speakers, "dev") | dict.fromkeys(corpus.test_speakers, "test")
        if not self._root.is_dir():
            raise CorpusError(f"corpus.path: '{self._root}' is not a folder; give the folder that holds {expected}")

    def _split(self, subset: str, speaker: str) -> str:
        named = subset.split("-")[0]
        return self._moved.get(speaker) or (named if named in SPLITS else "train")  # Libri-light: small, medium, large

    def _check_moved(self, speakers: set[str]) -> None:
        absent = sorted(self._moved.keys() - speakers)
        if absent:
            raise CorpusError(
                f"corpus.dev_speakers and corpus.test_speakers name {', '.join(absent)}, but '{self._root}' has no "
                "such speaker; give the names of speaker folders"
            )


class LibriSpeechSource(_Tree):
    """`<subset>/<speaker>/<chapter>/<speaker>-<chapter>-<n>.flac` and `<speaker>-<chapter>.trans.txt`.

    A group is a chapter. A missing transcript leaves the utterance without text. Phone times, where `alignments` has the
    same tree with `<utterance>.phn` files of `start end phone` lines in samples, are read along.
    """

    def __init__(self, corpus: LibriSpeech):
        super().__init__(corpus, "train-clean-100 …")
        self._alignments = Path(corpus.alignments).expanduser() if corpus.alignments else None
        if self._alignments and not self._alignments.is_dir():
            raise CorpusError(f"corpus.alignments: '{self._alignments}' is not a folder")

    def groups(self) -> list[Group]:
        chapters: dict[Path, int] = {}
        for file in sorted(self._root.glob("*/*/*/*.flac")):
            chapters[file.parent] = chapters.get(file.parent, 0) + file.stat().st_size
        if not chapters:
            raise CorpusError(
                f"'{self._root}' has no <subset>/<speaker>/<chapter>/*.flac. Expected LibriSpeech's layout; "
                "give the folder that holds subsets such as train-clean-100"
            )
        self._check_moved({chapter.parent.name for chapter in chapters})
        groups = []
        for chapter, size in chapters.items():
            subset, speaker, _ = chapter.relative_to(self._root).parts
            groups.append(Group(chapter.relative_to(self._root).as_posix(), self._split(subset, speaker), size))
        return groups

    def read(self, group: Group) -> Iterator[RawUtterance | Rejected]:
        folder = self._root / group.name
        speaker = folder.parts[-2]
        texts, unreadable = _transcripts(folder)
        if unreadable:
            yield unreadable
        for file in sorted(folder.glob("*.flac")):
            if not _is_text(file.name):
                yield Rejected(repr(file.name), "bad_name", f"{group.name}: the file's name is not UTF-8")
                continue
            phones, bad = self._phones(group.name, file.stem)
            if bad:
                yield bad
            yield RawUtterance(
                file.stem, speaker, group.split, "flac", file.read_bytes(), texts.pop(file.stem, None), phones
            )
        for name in texts:
            yield Rejected(name, "no_audio", f"{group.name} has a transcript but no recording of it")

    def _phones(self, group: str, name: str) -> tuple[list[tuple[int, int, str]] | None, Rejected | None]:
        file = self._alignments / group / f"{name}.phn" if self._alignments else None
        if file is None or not file.exists():
            return None, None
        try:
            rows = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            phones = [(int(start), int(end), phone) for start, end, phone in rows]
            times = [time for start, end, _ in phones for time in (start, end)]
            if times != sorted(times) or (times and not 0 <= times[0] <= times[-1] < 2**31):
                raise ValueError("times must rise from 0 on, in samples")
            return phones, None
        except ValueError as error:
            return None, Rejected(name, "bad_alignment", f"{file.name}: {error}; the audio is used without phones")


class AudioFolderSource(_Tree):
    """Any tree of audio files. A group is a folder's recordings, or some of them where there are many."""

    SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3")
    FILES_A_GROUP = 500

    def __init__(self, corpus: AudioFolder):
        super().__init__(corpus, "the recordings")

    def groups(self) -> list[Group]:
        groups, speakers = [], set()
        for folder, _, names in os.walk(self._root):
            subset, speaker = self._place(Path(folder))
            found = sorted(n for n in names if n.lower().endswith(self.SUFFIXES) and not n.startswith("."))
            for number, start in enumerate(range(0, len(found), self.FILES_A_GROUP)):
                files = tuple(found[start : start + self.FILES_A_GROUP])
                size = sum(os.stat(os.path.join(folder, name)).st_size for name in files)
                name = f"{Path(folder).relative_to(self._root).as_posix()}#{number:05d}"
                groups.append(Group(name, self._split(subset, speaker), size, files))
                speakers.add(speaker)
        if not groups:
            raise CorpusError(f"'{self._root}' holds no {', '.join(self.SUFFIXES)} files")
        self._check_moved(speakers)
        return groups

    def _place(self, folder: Path) -> tuple[str, str]:
        """(subset, speaker) of a folder's recordings; "" where no folder names them."""
        parts = folder.relative_to(self._root).parts
        subset, rest = (parts[0], parts[1:]) if parts and parts[0].split("-")[0] in SPLITS else ("", parts)
        return subset, rest[0] if rest else ""

    def read(self, group: Group) -> Iterator[RawUtterance | Rejected]:
        folder = self._root / group.name.rpartition("#")[0]
        _, speaker = self._place(folder)
        for name in group.files:
            file = folder / name
            if not _is_text(str(file.relative_to(self._root))):
                yield Rejected(repr(name), "bad_name", f"{group.name!r}: the file's name is not UTF-8")
                continue
            text, bad = _text_beside(file)
            if bad:
                yield bad
            utterance_id = file.relative_to(self._root).with_suffix("").as_posix()
            suffix = file.suffix[1:].lower()
            yield RawUtterance(utterance_id, speaker, group.split, suffix, file.read_bytes(), text)


def _text_beside(file: Path) -> tuple[str | None, Rejected | None]:
    """The transcript in `<file>.txt`, one line or several."""
    try:
        return " ".join(file.with_suffix(".txt").read_text(encoding="utf-8").split()) or None, None
    except FileNotFoundError:
        return None, None
    except (UnicodeDecodeError, OSError) as error:
        return None, Rejected(file.stem, "bad_transcript", f"{error}; the audio is used without text")


def _is_text(name: str) -> bool:
    """False for a file name whose bytes are not UTF-8: no table could hold it as an id."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _transcripts(folder: Path) -> tuple[dict[str, str], Rejected | None]:
    """Utterance id -> transcript of a chapter; a file that is not text costs the chapter its transcripts only."""
    texts: dict[str, str] = {}
    for file in sorted(folder.glob("*.trans.txt")):
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            return {}, Rejected(file.name, "bad_transcript", f"not UTF-8: {error}; the audio is used without text")
        texts |= {name: text for name, _, text in (line.partition(" ") for line in lines) if text.strip()}
    return texts, None
