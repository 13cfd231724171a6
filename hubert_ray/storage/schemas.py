"""What does each table hold? Columns, types and units: the contract between stages.

Tables are keyed by `utterance_id`, never by row order, so a shard that was written twice, merged late or read in another
order cannot shift labels against audio.
"""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

VERSION = 2  # part of every fingerprint: artifacts of another layout are stale, not misread

PHONE = pa.struct(
    [("start", pa.int32()), ("end", pa.int32()), ("phone", pa.string())]
)  # [start, end) in 16 kHz samples

MANIFEST = pa.schema(
    [
        ("utterance_id", pa.string()),
        ("speaker", pa.string()),
        ("split", pa.string()),  # train | dev | test
        ("shard", pa.string()),  # name of the tar that holds the audio, without folder and suffix
        ("offset", pa.int64()),  # of the compressed recording inside the tar, bytes; several rows may be ranges of one
        ("size", pa.int64()),  # of the compressed recording, bytes
        ("first", pa.int64()),  # where the utterance begins in its recording, samples at the stored rate
        ("stored_samples", pa.int64()),  # how many it has from there; -1: all, the utterance is the recording
        ("samples", pa.int64()),  # length at 16 kHz after resampling
        ("sample_rate_hz", pa.int32()),  # of the stored audio
        ("speech_share", pa.float32()),  # of a range, as voice activity has it; null for a whole recording
        ("text", pa.string()),  # transcript as the corpus has it; null where there is none
        ("phones", pa.list_(PHONE)),  # phone times; null where there is no alignment
        ("digest", pa.binary(16)),  # of the decoded samples, before resampling
    ]
)

QUARANTINE = pa.schema(
    [
        ("source", pa.string()),  # file or member name, as far as it could be read
        ("reason", pa.string()),  # one word; the vocabulary is data/audio.py, data/shards.py and data/corpora/
        ("detail", pa.string()),
    ]
)

LABELS = pa.schema(
    [
        ("utterance_id", pa.string()),
        (
            "labels",
            pa.list_(pa.uint16()),
        ),  # cluster ids of the teacher's frames in order; of each frame one per label stream
        ("frame_rate_hz", pa.int16()),  # 100 for MFCC labels, 50 for transformer labels
    ]
)

HYPOTHESES = pa.schema(
    [
        ("utterance_id", pa.string()),
        ("reference", pa.string()),
        ("system", pa.string()),  # pretrained | scratch
        ("greedy", pa.string()),
        ("lm", pa.string()),
    ]
)


def encode(table: pa.Table) -> bytes:
    """Parquet bytes of a table."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def decode(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """The table in Parquet bytes."""
    return pq.read_table(pa.BufferReader(data), columns=columns)
