"""Where are the labels of utterance N? In one flat file on the worker's disk, found by row of the index.

Label parts are keyed by utterance id. Shard by shard they are joined to the ids of the corpus, checked against the audio's length,
and laid end to end in a memory-mapped uint16 file: 22 GB for 60,000 h at 50 Hz and a label stream, of which only touched pages are
in memory. The workers of a node share one file, laid out by whichever comes first; it stays in the temporary folder, where a rerun
finds it again, until other labels are laid out there while nobody reads it. Where a codebook has several streams, the labels of a
frame lie side by side. An utterance's place follows from the lengths of those before it: it is kept for every 1024th row and added
up from there, so that memory hardly grows with the corpus.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hubert_ray.data.frames import frames_at
from hubert_ray.data.index import Index, Shard
from hubert_ray.data.loader import ahead
from hubert_ray.data.shards import Manifest
from hubert_ray.errors import LabelError
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage

_LABELS_AT_ONCE = 2**22
PARTS_AHEAD = 8  # label parts in memory while a store is laid out
_ROWS_A_PLACE = 1024


class LabelStore:
    """Labels of the utterances of `index`, by row; `streams` of them for each frame.

    Raises LabelError where an utterance has no labels, more than one row, or another number of labels than its length, the
    frame rate and the streams ask for, and where there are labels of an utterance that the corpus does not have.

    `making` tells sealed labels from all others: stores with the same one share a file of their node and trust what it holds.
    Without it the parts are read, and the file is gone with the store.
    """

    def __init__(
        self, storage: Storage, corpus_path: str, labels_path: str, index: Index, frame_rate_hz: int, streams: int = 1,
        making: str | None = None,
    ):  # fmt: skip
        self.frame_rate_hz = frame_rate_hz
        self._streams = streams
        self._samples = index.numbers("samples")
        self._places = self._sums(len(index))
        if making is None:
            with tempfile.TemporaryFile(prefix="hubert-ray-labels-") as file:
                self._lay_out(file, storage, corpus_path, labels_path, index)
                self._values = _mapped(file)
        else:
            self._values = self._shared(making, storage, corpus_path, labels_path, index)

    def _shared(self, making: str, storage: Storage, corpus_path: str, labels_path: str, index: Index) -> np.ndarray:
        """This node's file, mapped. Whoever makes or removes files holds the folder's lock, and who reads one that file's."""
        what = [
            making,
            index.contents.digest,
            [shard.name for shard in index.shards],
            self.frame_rate_hz,
            self._streams,
        ]
        folder = Path(tempfile.gettempdir()) / f"hubert-ray-labels-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        file = folder / f"{hashlib.sha256(msgspec.json.encode(what)).hexdigest()[:16]}.u2"
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                _remove_unread(folder)
                part = folder / "part"
                with part.open("wb") as target:
                    self._lay_out(target, storage, corpus_path, labels_path, index)
                part.replace(file)
            self._file = file.open("rb")  # open, and so held, for as long as the store lives
            fcntl.flock(self._file, fcntl.LOCK_SH)
        return _mapped(self._file)

    def _lay_out(self, file: BinaryIO, storage: Storage, corpus_path: str, labels_path: str, index: Index) -> None:
        """Writes the labels of all shards in the order of the index; parts are read side by side."""

        def read(place: tuple[Shard, slice]) -> np.ndarray:
            shard, rows = place
            try:
                part = schemas.decode(storage.read(f"{labels_path}/{layout.part(shard.name)}"))
            except FileNotFoundError as error:
                raise LabelError(f"the labels of shard {shard.name} are missing: run assign_labels again") from error
            self._check_rate(part, shard.name)
            ids = Manifest.read(storage, corpus_path, [shard.name], ["utterance_id"]).table["utterance_id"]
            return self._in_order(part, ids.combine_chunks(), self._counts(rows), shard.name)

        for labels in ahead(read, index.by_shard(), PARTS_AHEAD):
            file.write(labels.data)
        file.flush()

    def _counts(self, rows: slice) -> np.ndarray:
        """How many labels each of some rows has, int64."""
        return frames_at(self._samples[rows], self.frame_rate_hz) * self._streams

    def _sums(self, rows: int) -> np.ndarray:
        """How many labels lie before row 0, row 1024, …, and in all."""
        sums = [np.zeros(1, np.int64)]
        for start in range(0, rows, 1024 * _ROWS_A_PLACE):
            counts_N = self._counts(slice(start, min(start + 1024 * _ROWS_A_PLACE, rows)))
            sums.append(np.add.reduceat(counts_N, np.arange(0, len(counts_N), _ROWS_A_PLACE)))
        return np.cumsum(np.concatenate(sums))

    def _check_rate(self, part: pa.Table, shard: str) -> None:
        rates = pc.unique(part["frame_rate_hz"]).to_pylist()
        if rates not in ([self.frame_rate_hz], []):
            raise LabelError(f"labels of shard {shard} are at {rates} Hz, expected {self.frame_rate_hz} Hz")

    def _in_order(self, part: pa.Table, ids: pa.Array, expected_N: np.ndarray, shard: str) -> np.ndarray:
        """The labels of a shard in the order of `ids`, whatever their order in the part, uint16."""
        names = part["utterance_id"].combine_chunks()
        place_P = pc.index_in(names, value_set=ids)
        if len(ids) != len(expected_N) or place_P.null_count:
            strange = names.filter(pc.is_null(place_P)).slice(0, 1).to_pylist()
            raise LabelError(
                f"shard {shard}: {strange or 'the manifest part'} is not in the index. Labels and corpus do not belong together: "
                "run assign_labels again."
            )
        rows_P = place_P.to_numpy()
        again_P = np.ones(len(rows_P), dtype=bool)
        again_P[np.unique(rows_P, return_index=True)[1]] = False
        counts_P = pc.list_value_length(part["labels"]).to_numpy()
        wrong = np.flatnonzero((counts_P != expected_N[rows_P]) | again_P)
        if len(wrong):
            k = wrong[0]
            raise LabelError(
                f"'{names[int(k)].as_py()}' has {counts_P[k]} labels{' a second time' if again_P[k] else ''}; its audio has "
                f"{expected_N[rows_P[k]] // self._streams} frames at {self.frame_rate_hz} Hz"
                + (f" and {self._streams} label streams" if self._streams > 1 else "")
                + ". Run assign_labels again."
            )
        if len(rows_P) < len(ids):
            missing = ids[int(np.setdiff1d(np.arange(len(ids)), rows_P)[0])].as_py()
            raise LabelError(
                f"{len(ids) - len(rows_P)} of {len(ids)} utterances of shard {shard} have no labels, '{missing}' "
                "for one. Labels and corpus do not belong together: run assign_labels again."
            )
        in_order = part["labels"].take(pa.array(np.argsort(rows_P)))
        return pc.list_flatten(in_order).combine_chunks().to_numpy()

    def histograms(self, rows: slice, classes: tuple[int, ...]) -> list[np.ndarray]:
        """For each stream how often each label occurs in the utterances of some rows; longer than its entry of `classes` where
        labels are."""
        counts_SK = np.zeros((self._streams, 2**16), dtype=np.int64)
        first, beyond = self._place(rows.start), self._place(rows.stop)
        for start in range(first, beyond, _LABELS_AT_ONCE * self._streams):  # numpy widens each to 8 bytes
            stop = min(start + _LABELS_AT_ONCE * self._streams, beyond)
            for stream, counts_K in enumerate(counts_SK):
                counts_K += np.bincount(self._values[start + stream : stop : self._streams], minlength=len(counts_K))
        ends = [int(counts_K.nonzero()[0].max(initial=-1)) + 1 for counts_K in counts_SK]
        return [counts_K[: max(pair)] for counts_K, *pair in zip(counts_SK, classes, ends, strict=True)]

    def window(self, row: int, window: slice) -> np.ndarray:
        """Labels of one utterance at the frames of `window` (see data/frames.py), (frames, streams) uint16."""
        start, stop = self._place(row), self._place(row + 1)
        return self._values[start:stop].reshape(-1, self._streams)[window]

    def _place(self, row: int) -> int:
        """How many labels lie before those of a row."""
        known = row // _ROWS_A_PLACE
        return int(self._places[known] + self._counts(slice(known * _ROWS_A_PLACE, row)).sum())


def _mapped(file: BinaryIO) -> np.ndarray:
    """As plain numbers: the views of a memmap cost microseconds each."""
    if not os.fstat(file.fileno()).st_size:
        return np.empty(0, np.uint16)  # nothing cannot be mapped
    return np.asarray(np.memmap(file, np.uint16, "r"))


def _remove_unread(folder: Path) -> None:
    """Labels that no process of this node holds make room."""
    for file in folder.glob("*.u2"):
        with file.open("rb") as found:
            try:
                fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            file.unlink()
