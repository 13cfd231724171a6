"""Which utterances can be spelled, and which of them may be fine-tuned on? Rows of a manifest, chosen by their text."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hubert_ray.asr import letters
from hubert_ray.config.recipe import Finetune
from hubert_ray.data.frames import SAMPLE_RATE
from hubert_ray.data.index import Index
from hubert_ray.data.shards import Manifest
from hubert_ray.storage import schemas
from hubert_ray.storage.filesystem import Storage


def read_transcribed(storage: Storage, corpus_path: str, split: str) -> Manifest:
    """The utterances of a split that have a transcript, without their phones. Parts that have none are not read."""
    shards = [shard.name for shard in Index.open(storage, corpus_path).split(split).shards if shard.transcribed]
    columns = [name for name in schemas.MANIFEST.names if name != "phones"]
    return Manifest.read(storage, corpus_path, shards, columns, pc.field("text").is_valid())


def labelled_subset(train: Manifest, settings: Finetune) -> Manifest:
    """Transcribed train utterances, drawn by seed until `label_seconds` are full."""
    train = spellable(train)[0]
    order = np.random.default_rng(settings.seed).permutation(len(train))
    ends = np.cumsum(train.numbers("samples")[order])
    chosen = np.sort(order[: int(np.searchsorted(ends, settings.label_seconds * SAMPLE_RATE, side="right"))])
    return Manifest(train.table.take(chosen))


def spellable(manifest: Manifest) -> tuple[Manifest, list[str]]:
    """The utterances whose transcript the alphabet can spell, and their normalised transcripts."""
    transcribed = manifest.transcribed()
    rows, texts = [], []
    for row, text in enumerate(transcribed.table["text"].to_pylist()):
        try:
            texts.append(letters.normalise(text))
            rows.append(row)
        except letters.UnspellableTextError:
            continue
    return Manifest(transcribed.table.take(pa.array(rows, pa.int64()))), texts
