"""Which utterances are a fair sample of so many hours? Places of a shuffle of all of them, taken until the hours are full.

Lengths come from the index, and only the manifest parts that hold a drawn utterance are read, so memory follows the hours asked
for and not the corpus. Which utterance has a transcript or phones is only known from its part: it is drawn first and passed over
then. Each round draws as much as is missing, and at least as much as all rounds before it, so that few of them find what is rare.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from hubert_ray.data.frames import SAMPLE_RATE
from hubert_ray.data.index import Index, Shard
from hubert_ray.data.shards import Manifest
from hubert_ray.data.shuffle import Shuffle
from hubert_ray.storage import schemas
from hubert_ray.storage.filesystem import Storage

_AT_MOST = 2**14  # utterances in a round: 55 hours of 12 s each


def draw(
    storage: Storage,
    corpus_path: str,
    among: Callable[[Shard], bool],
    keep: Callable[[Manifest], Manifest],
    seconds: float,
    seed: int,
) -> Manifest:
    """Utterances that `keep` leaves of the shards `among`, drawn by seed until they reach `seconds`; all where they do not.

    In the order of the draw: those of fewer seconds are its beginning.
    """
    index = Index.open(storage, corpus_path)
    shards = [(shard.name, rows) for shard, rows in index.by_shard() if among(shard)]
    starts = np.array([rows.start for _, rows in shards], dtype=np.int64)
    bounds = np.cumsum([0, *(rows.stop - rows.start for _, rows in shards)])
    total = int(bounds[-1])
    order = Shuffle(total, seed)
    found, looked, heard, missing = [schemas.MANIFEST.empty_table()], 0, 0, seconds * SAMPLE_RATE
    while looked < total and missing > 0:
        places = order(np.arange(looked, min(looked + _AT_MOST, total)))
        numbers = np.searchsorted(bounds, places, side="right") - 1
        rows = places - bounds[numbers]  # of their own shard
        samples = index.numbers("samples")[starts[numbers] + rows]
        upto = _reaching(samples, max(missing, heard))
        looked, heard = looked + len(samples[:upto]), heard + int(samples[:upto].sum(dtype=np.int64))
        parts = []
        for number in np.unique(numbers[:upto]):
            turns = np.flatnonzero(numbers[:upto] == number)
            part = Manifest.read_shard(storage, corpus_path, shards[number][0]).table.take(rows[turns])
            parts.append(keep(Manifest(part.append_column("turn", pa.array(turns)))).table)
        kept = pa.concat_tables(parts).sort_by("turn").drop_columns("turn")
        found.append(kept.slice(0, _reaching(kept["samples"].to_numpy(), missing)))
        missing -= int(found[-1]["samples"].to_numpy().sum())
    return Manifest(pa.concat_tables(found))


def _reaching(samples_U: np.ndarray, wanted: float) -> int:
    """How many utterances from the first on have so many samples; one more than there are where all do not reach them."""
    return int(np.searchsorted(np.cumsum(samples_U, dtype=np.int64), wanted)) + 1
