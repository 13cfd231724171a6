"""Where are the labels of utterance N? In one flat file on the worker's disk, found by manifest row.

Label parts are keyed by utterance id. They are joined to the manifest once, checked against the audio's length, and
laid end to end in a memory-mapped uint16 file: 22 GB for 60,000 h at 50 Hz and a label stream, of which only touched pages are in
memory. Where a codebook has several streams, the labels of a frame lie side by side.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hubert_ray.data.frames import RECEPTIVE_FIELD, SAMPLE_RATE
from hubert_ray.data.shards import Manifest
from hubert_ray.errors import LabelError
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage

_LABELS_AT_ONCE = 2**22


class LabelStore:
    """Labels of the utterances of `manifest`, by row; `streams` of them for each frame.

    Raises LabelError where an utterance has no labels, more than one row, or another number of labels than its length, the
    frame rate and the streams ask for.
    """

    def __init__(self, storage: Storage, labels_path: str, manifest: Manifest, frame_rate_hz: int, streams: int = 1):
        self.frame_rate_hz = frame_rate_hz
        self._streams = streams
        stride = SAMPLE_RATE // frame_rate_hz
        frames = np.maximum(0, (manifest.numbers("samples") - RECEPTIVE_FIELD) // stride + 1)
        self._bounds = np.concatenate([[0], np.cumsum(frames * streams)])
        self._file = tempfile.NamedTemporaryFile(prefix="hubert-ray-labels-")
        self._values = np.memmap(self._file, dtype=np.uint16, mode="w+", shape=(max(1, int(self._bounds[-1])),))
        found = np.zeros(len(manifest), dtype=bool)
        ids = manifest.table["utterance_id"].combine_chunks()
        for shard, rows_N in _rows_by_shard(manifest):
            try:
                part = schemas.decode(storage.read(f"{labels_path}/{layout.part(shard)}"))
            except FileNotFoundError as error:
                raise LabelError(f"the labels of shard {shard} are missing: run assign_labels again") from error
            self._check_rate(part, shard)
            # Looked up among the shard's own ids: an index of all of them would be built anew for every shard.
            place_P = pc.index_in(part["utterance_id"], value_set=ids.take(rows_N)).to_numpy(zero_copy_only=False)
            self._copy(part, rows_N, place_P, found)
        if not found.all():
            missing = ids[int(np.flatnonzero(~found)[0])].as_py()
            raise LabelError(
                f"{np.count_nonzero(~found)} of {len(found)} utterances have no labels in {labels_path}, '{missing}' "
                "for one. Labels and corpus do not belong together: run assign_labels again."
            )

    def _check_rate(self, part: pa.Table, shard: str) -> None:
        rates = pc.unique(part["frame_rate_hz"]).to_pylist()
        if rates not in ([self.frame_rate_hz], []):
            raise LabelError(f"labels of shard {shard} are at {rates} Hz, expected {self.frame_rate_hz} Hz")

    def _copy(self, part: pa.Table, rows_N: np.ndarray, place_P: np.ndarray, found: np.ndarray) -> None:
        """`place_P`: for each row of the part its place in `rows_N`; NaN for one outside this selection, as of the dev split."""
        values, offsets = _flat(part["labels"])
        chosen_M = np.flatnonzero(~np.isnan(place_P))
        rows_M = rows_N[place_P[chosen_M].astype(np.int64)]
        counts_M, expected_M = np.diff(offsets)[chosen_M], np.diff(self._bounds)[rows_M]
        again_M = np.ones(len(rows_M), dtype=bool)
        again_M[np.unique(rows_M, return_index=True)[1]] = False
        wrong = np.flatnonzero((counts_M != expected_M) | again_M)
        if len(wrong):
            k = wrong[0]
            name = part["utterance_id"][int(chosen_M[k])].as_py()
            raise LabelError(
                f"'{name}' has {counts_M[k]} labels{' a second time' if again_M[k] else ''}; its audio has "
                f"{expected_M[k] // self._streams} frames at {self.frame_rate_hz} Hz"
                + (f" and {self._streams} label streams" if self._streams > 1 else "")
                + ". Run assign_labels again."
            )
        within = np.arange(counts_M.sum()) - np.repeat(np.cumsum(counts_M) - counts_M, counts_M)
        source, target = offsets[chosen_M], self._bounds[rows_M]
        self._values[np.repeat(target, counts_M) + within] = values[np.repeat(source, counts_M) + within]
        found[rows_M] = True

    def histograms(self, chosen_N: np.ndarray, classes: tuple[int, ...]) -> list[np.ndarray]:
        """For each stream how often each label occurs in the chosen utterances (a bool per row); longer than its entry of
        `classes` where labels are."""
        counts_SK = np.zeros((self._streams, 2**16), dtype=np.int64)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen_N, [False]]).astype(np.int8)))
        for first, beyond in edges.reshape(-1, 2):  # neighbouring rows lie together
            for start in range(
                self._bounds[first], self._bounds[beyond], _LABELS_AT_ONCE * self._streams
            ):  # numpy widens each to 8 bytes
                stop = min(start + _LABELS_AT_ONCE * self._streams, self._bounds[beyond])
                for stream, counts_K in enumerate(counts_SK):
                    counts_K += np.bincount(
                        self._values[start + stream : stop : self._streams], minlength=len(counts_K)
                    )
        ends = [int(counts_K.nonzero()[0].max(initial=-1)) + 1 for counts_K in counts_SK]
        return [counts_K[: max(pair)] for counts_K, *pair in zip(counts_SK, classes, ends, strict=True)]

    def window(self, row: int, window: slice) -> np.ndarray:
        """Labels of one utterance at the frames of `window` (see data/frames.py), (frames, streams) uint16."""
        start, stop = int(self._bounds[row]), int(self._bounds[row + 1])
        return self._values[start:stop].reshape(-1, self._streams)[window]


def _rows_by_shard(manifest: Manifest) -> Iterator[tuple[str, np.ndarray]]:
    """Each shard with its rows, ascending; one pass over the manifest."""
    shards = manifest.table["shard"].combine_chunks().dictionary_encode()
    numbers = shards.indices.to_numpy()
    order = np.argsort(numbers, kind="stable")
    cuts = np.cumsum(np.bincount(numbers, minlength=len(shards.dictionary)))
    yield from zip(shards.dictionary.to_pylist(), np.split(order, cuts[:-1]), strict=True)


def _flat(lists: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """(all values, offsets): list i is values[offsets[i] : offsets[i + 1]]. Without copies where there is one chunk."""
    whole = lists.combine_chunks()
    return whole.values.to_numpy(), whole.offsets.to_numpy().astype(np.int64)
