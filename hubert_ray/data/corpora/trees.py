"""Which recordings lie in a tree of folders? LibriSpeech's and Libri-light's layout, and any other."""

from __future__ import annotations

import hashlib
import math
import posixpath
from collections.abc import Iterator

import msgspec

from hubert_ray.config.recipe import AudioFolder, LibriSpeech
from hubert_ray.data.alignments import Alignments
from hubert_ray.data.corpora.source import SUFFIXES, Group, Placed, one_line, split_of
from hubert_ray.data.shards import RawUtterance, Rejected, is_text
from hubert_ray.errors import AudioError, CorpusError


class LibriSpeechSource(Placed):
    """`<subset>/<speaker>/<chapter>/<recording>.flac`, with `*.trans.txt` (LibriSpeech) or `<recording>.json` (Libri-light).

    A group is a chapter. LibriSpeech's recordings are named `<speaker>-<chapter>-<n>`, which is their id; the id of any other
    is its path below the subset, since Libri-light's books repeat names. A missing transcript leaves an utterance without
    text.
    """

    def __init__(self, corpus: LibriSpeech):
        super().__init__(corpus, "the folder that holds train-clean-100 …")
        self.shard_bytes = corpus.shard_mib * 2**20
        self._alignments = Alignments(corpus.alignments)

    def groups(self) -> list[Group]:
        groups, speakers = [], set()
        for folder, files in self.storage.walk():
            sizes = [size for name, size in files.items() if name.endswith(".flac")]
            if sizes and folder.count("/") == 2:
                subset, speaker, _ = folder.split("/")
                groups.append(Group(folder, self.split(subset, speaker), sum(sizes)))
                speakers.add(speaker)
        if not groups:
            raise CorpusError(
                f"'{self.storage.url}' has no <subset>/<speaker>/<chapter>/*.flac. Expected LibriSpeech's layout; "
                "give the folder that holds subsets such as train-clean-100"
            )
        self.check_moved(speakers)
        return groups

    def read(self, group: Group) -> Iterator[RawUtterance | Rejected]:
        _, speaker, chapter = group.name.split("/")
        files, _ = self.storage.scan(group.name)
        texts: dict[str, str] = {}
        for name in files:
            if name.endswith(".trans.txt"):
                try:
                    texts |= _transcripts(self.text(f"{group.name}/{name}"))
                except AudioError as error:
                    yield Rejected(name, error.reason, error.detail)
        for name in files:
            stem, suffix = posixpath.splitext(name)
            if suffix != ".flac":
                continue
            text = texts.pop(stem, None)
            utterance_id = stem if stem.startswith(f"{speaker}-{chapter}-") else f"{speaker}/{chapter}/{stem}"
            try:
                audio = self.recording(f"{group.name}/{name}")
            except AudioError as error:
                yield Rejected(utterance_id if is_text(name) else repr(name), error.reason, error.detail)
                continue
            reader, speech = speaker, None
            if f"{stem}.json" in files:
                try:
                    reader, speech = _metadata(self.recording(f"{group.name}/{stem}.json"), speaker)
                except (AudioError, ValueError) as error:
                    yield Rejected(f"{stem}.json", "bad_metadata", f"{error}; the folder's speaker is used")
            phones, bad = self._alignments.read(f"{group.name}/{stem}", utterance_id)
            if bad:
                yield bad
            yield RawUtterance(utterance_id, reader, group.split, "flac", audio, text, phones, speech=speech)
        for name in texts:
            yield Rejected(name, "no_audio", f"{group.name} has a transcript but no recording of it")


def _transcripts(text: str) -> dict[str, str]:
    """Recording -> transcript of a chapter's lines."""
    return {name: words for name, _, words in (line.partition(" ") for line in text.splitlines()) if words.strip()}


def _metadata(metadata: bytes, folder: str) -> tuple[str, list[tuple[float, float]] | None]:
    """(speaker, voice activity in seconds) of a recording of Libri-light. Raises ValueError where the JSON is broken."""
    found = msgspec.json.decode(metadata)
    if not isinstance(found, dict):
        raise ValueError(f"a JSON {type(found).__name__}, expected an object")
    speaker = found.get("speaker")
    speech = msgspec.convert(found.get("voice_activity"), list[tuple[float, float]] | None)
    if speech and not all(0 <= onset <= offset < math.inf for onset, offset in speech):
        raise ValueError("voice_activity: each is an onset and an offset in seconds")
    return (str(speaker) if isinstance(speaker, str | int) and str(speaker) else folder), speech


class AudioFolderSource(Placed):
    """Any tree of audio files. A group is a folder's recordings, or a stretch of them by name where there are many."""

    FILES_A_GROUP = 500

    def __init__(self, corpus: AudioFolder):
        super().__init__(corpus, "the folder that holds the recordings")
        self.shard_bytes = corpus.shard_mib * 2**20
        self._alignments = Alignments(corpus.alignments)
        self._folder: str | None = None  # that was read last, since its groups come one after the other
        self._there: dict[str, int] = {}
        self._found: list[str] = []

    def groups(self) -> list[Group]:
        groups, speakers = [], set()
        for folder, files in self.storage.walk():
            subset, speaker = _place(folder)
            found = _recordings_and_lone_texts(list(files))
            for number in range(-(-len(found) // self.FILES_A_GROUP)):
                chosen = self._stretch(found, number)
                size = sum(files[name] for name in chosen)
                name = f"{folder}#{number:05d}"
                groups.append(Group(name, self.split(subset, speaker), size, _digest(chosen)))
                speakers.add(speaker)
        if not groups:
            raise CorpusError(f"'{self.storage.url}' holds no {', '.join(SUFFIXES)} files")
        self.check_moved(speakers)
        return groups

    def read(self, group: Group) -> Iterator[RawUtterance | Rejected]:
        folder, _, number = group.name.rpartition("#")
        _, speaker = _place(folder)
        if folder != self._folder:
            self._there, _ = self.storage.scan(folder)
            self._folder, self._found = folder, _recordings_and_lone_texts(list(self._there))
        names = self._stretch(self._found, int(number))
        if _digest(names) != group.digest:
            raise CorpusError(
                f"'{self.storage.full(folder)}' has other files than when the corpus was begun; put those back, or remove the "
                "corpus and run prepare_data again"
            )
        for name in names:
            utterance_id, suffix = posixpath.splitext(posixpath.join(folder, name))
            if suffix == ".txt":
                yield Rejected(utterance_id, "no_audio", f"there is '{name}' but no recording of that name")
                continue
            try:
                audio = self.recording(posixpath.join(folder, name))
            except AudioError as error:
                yield Rejected(utterance_id if is_text(name) else repr(name), error.reason, error.detail)
                continue
            text = None
            if f"{posixpath.splitext(name)[0]}.txt" in self._there:
                try:
                    text = one_line(self.text(f"{utterance_id}.txt"))
                except AudioError as error:
                    yield Rejected(utterance_id, error.reason, error.detail)
            phones, bad = self._alignments.read(utterance_id, utterance_id)
            if bad:
                yield bad
            yield RawUtterance(utterance_id, speaker, group.split, suffix[1:].lower(), audio, text, phones)

    def _stretch(self, found: list[str], number: int) -> list[str]:
        """What a group holds of a folder."""
        return found[number * self.FILES_A_GROUP : (number + 1) * self.FILES_A_GROUP]


def _digest(names: list[str]) -> str:
    """Of names that may not be UTF-8."""
    return hashlib.sha256("/".join(names).encode("utf-8", "surrogateescape")).hexdigest()


def _recordings_and_lone_texts(names: list[str]) -> list[str]:
    """The recordings of a folder, and, where it has any, the transcripts that belong to none of them."""
    seen = [name for name in names if not name.startswith(".")]
    recordings = {name: posixpath.splitext(name)[0] for name in seen if name.lower().endswith(SUFFIXES)}
    stems = set(recordings.values())
    return [
        name
        for name in seen
        if name in recordings or (recordings and name.endswith(".txt") and name.removesuffix(".txt") not in stems)
    ]


def _place(folder: str) -> tuple[str, str]:
    """(subset, speaker) of a folder's recordings; "" where no folder names them."""
    parts = folder.split("/") if folder else []
    subset, rest = (parts[0], parts[1:]) if parts and split_of(parts[0]) else ("", parts)
    return subset, rest[0] if rest else ""
