"""Which utterances can be spelled, and which of them may be fine-tuned on? Rows of a manifest, chosen by their text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hubert_ray.asr import letters
from hubert_ray.config.recipe import Finetune
from hubert_ray.data.draw import draw
from hubert_ray.data.frames import SAMPLE_RATE
from hubert_ray.data.index import Index
from hubert_ray.data.shards import Manifest
from hubert_ray.storage import schemas
from hubert_ray.storage.filesystem import Storage


def transcribed_shards(storage: Storage, corpus_path: str, split: str) -> list[str]:
    """The shards of a split that have a transcript at all."""
    return [shard.name for shard in Index.open(storage, corpus_path).split(split).shards if shard.transcribed]


def read_transcribed(storage: Storage, corpus_path: str, split: str) -> Manifest:
    """The utterances of a split that have a transcript, without their phones. Parts that have none are not read."""
    columns = [name for name in schemas.MANIFEST.names if name != "phones"]
    shards = transcribed_shards(storage, corpus_path, split)
    return Manifest.read(storage, corpus_path, shards, columns, pc.field("text").is_valid())


def spelled_texts(storage: Storage, corpus_path: str, split: str) -> Iterator[str]:
    """The normalised transcripts of a split, of which one shard's are in memory."""
    for shard in transcribed_shards(storage, corpus_path, split):
        yield from spellable(Manifest.read(storage, corpus_path, [shard], ["text"]))[1]


def labelled_subset(storage: Storage, corpus_path: str, settings: Finetune) -> Manifest:
    """Train utterances whose transcript can be spelled, drawn by seed until `label_seconds` are full; not a second more."""
    train = draw(
        storage,
        corpus_path,
        lambda shard: shard.split == "train" and shard.transcribed > 0,
        lambda rows: spellable(rows)[0],
        settings.label_seconds,
        settings.seed,
    )
    ends = np.cumsum(train.numbers("samples"))
    within = int(np.searchsorted(ends, settings.label_seconds * SAMPLE_RATE, side="right"))
    return Manifest(train.table.slice(0, within))


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
