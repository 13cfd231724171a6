"""Where are the labels of utterance N? In one flat file on the worker's disk, found by manifest row.

Label parts are keyed by utterance id. They are joined to the manifest once, checked against the audio's length, and
laid end to end in a memory-mapped uint16 file: 22 GB for 60,000 h at 50 Hz, of which only touched pages are in memory.
"""

from __future__ import annotations

import itertools
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


class LabelStore:
    """Labels of the utterances of `manifest`, by row.

    Raises LabelError where an utterance has no labels, more than one row, or another number of labels than its length
    and the frame rate ask for.
    """

    def __init__(self, storage: Storage, labels_path: str, manifest: Manifest, frame_rate_hz: int):
        self.frame_rate_hz = frame_rate_hz
        stride = SAMPLE_RATE // frame_rate_hz
        frames = np.maximum(0, (manifest.numbers("samples") - RECEPTIVE_FIELD) // stride + 1)
        self._bounds = np.concatenate([[0], np.cumsum(frames)])
        self._file = tempfile.NamedTemporaryFile(prefix="hubert-ray-labels-")
        self._values = np.memmap(self._file, dtype=np.uint16, mode="w+", shape=(max(1, int(self._bounds[-1])),))
        found = np.zeros(len(manifest), dtype=bool)
        ids = manifest.table["utterance_id"].combine_chunks()
        for shard in manifest.shards():
            part = schemas.decode(storage.read(f"{labels_path}/{layout.part(shard)}"))
            self._check_rate(part, shard)
            self._copy(part, pc.index_in(part["utterance_id"], value_set=ids), found)
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

    def _copy(self, part: pa.Table, rows: pa.ChunkedArray, found: np.ndarray) -> None:
        for k, (row, own) in enumerate(zip(rows.to_pylist(), _rows(part["labels"]), strict=True)):
            if row is None:
                continue  # labels of an utterance outside this selection, such as a dev utterance
            start, stop = int(self._bounds[row]), int(self._bounds[row + 1])
            if len(own) != stop - start or found[row]:
                name = part["utterance_id"][k].as_py()
                raise LabelError(
                    f"'{name}' has {len(own)} labels{' a second time' if found[row] else ''}; its audio has "
                    f"{stop - start} frames at {self.frame_rate_hz} Hz. Run assign_labels again."
                )
            self._values[start:stop] = own
            found[row] = True

    def window(self, row: int, window: slice) -> np.ndarray:
        """Labels of one utterance at the frames of `window` (see data/frames.py), uint16."""
        start, stop = int(self._bounds[row]), int(self._bounds[row + 1])
        return self._values[start:stop][window]


def _rows(lists: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """The values of each list, without copies. Offsets count within their chunk's `values`, also in a slice."""
    for chunk in lists.chunks:
        values, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
        for start, stop in itertools.pairwise(offsets.tolist()):
            yield values[start:stop]
