"""Is a draw a fair sample, the same for everyone, of just the hours asked for?"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from hubert_ray.data import draw as drawing
from hubert_ray.data.draw import draw
from hubert_ray.data.index import Shard
from hubert_ray.data.shards import WHOLE, Manifest
from hubert_ray.storage import schemas
from hubert_ray.storage.filesystem import Storage
from tests.corpora import write_corpus

EACH = 500  # utterances a shard, of 1 to 10 s; one of fifty has a text


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Storage:
    rng = np.random.default_rng(0)
    usual = {"speaker": "s", "offset": 0, "size": 1, "sample_rate_hz": 16_000} | WHOLE
    parts = {}
    for shard in ("dev-00000", *(f"train-{n:05d}" for n in range(10))):
        fields = usual | {"split": shard[:-6], "shard": shard}
        rows = [
            fields
            | {
                "utterance_id": f"{shard}-{n:03d}",
                "samples": int(rng.integers(16_000, 160_000)),
                "text": None if n % 50 else "A",
            }
            for n in range(EACH)
        ]
        parts[shard] = pa.Table.from_pylist(rows, schema=schemas.MANIFEST)
    storage = Storage(str(tmp_path_factory.mktemp("draw")))
    write_corpus(storage, "c", parts)
    return storage


def in_train(shard: Shard) -> bool:
    return shard.split == "train"


def every(rows: Manifest) -> Manifest:
    return rows


def rare(rows: Manifest) -> Manifest:
    return rows.where(pc.is_valid(rows.table["text"]))


def ids(manifest: Manifest) -> list[str]:
    return manifest.table["utterance_id"].to_pylist()


@pytest.mark.parametrize("keep", [every, rare])
@pytest.mark.parametrize("seconds", [0.5, 60.0, 300.0])
def test_a_draw_just_reaches_the_seconds(storage, keep, seconds):
    found = draw(storage, "c", in_train, keep, seconds, 1)
    samples = found.numbers("samples")
    assert samples.sum() >= seconds * 16_000 > samples[:-1].sum()
    assert len(set(ids(found))) == len(found) == len(keep(found))
    assert all(shard.startswith("train") for shard in found.shards())
    assert found.table.schema == schemas.MANIFEST


@pytest.mark.parametrize(("keep", "count"), [(every, 10 * EACH), (rare, 10 * EACH // 50)])
def test_a_draw_of_more_than_there_is_is_all(storage, keep, count):
    found = draw(storage, "c", in_train, keep, 1e9, 1)
    assert len(set(ids(found))) == len(found) == count
    assert ids(found) != sorted(ids(found))


def test_among_no_shards_nothing_is_drawn(storage):
    assert len(draw(storage, "c", lambda shard: False, every, 10.0, 1)) == 0


@pytest.mark.parametrize("keep", [every, rare])
def test_less_is_the_beginning_of_more_however_many_are_looked_up_at_a_time(storage, monkeypatch, keep):
    more = ids(draw(storage, "c", in_train, keep, 400.0, 1))
    for at_most in (2**14, 7):
        monkeypatch.setattr(drawing, "_AT_MOST", at_most)
        less = ids(draw(storage, "c", in_train, keep, 90.0, 1))
        assert less == more[: len(less)] != more


def test_a_draw_is_from_everywhere_and_by_seed(storage):
    one, other = (draw(storage, "c", in_train, every, 5000.0, seed) for seed in (1, 2))
    counts = np.unique(one.table["shard"].to_pylist(), return_counts=True)[1]
    assert len(counts) == 10  # of about 90 a shard, with a deviation of 9
    assert counts.min() > 50
    assert not set(ids(one)) >= set(ids(other))


def test_what_is_rare_takes_few_rounds(storage, monkeypatch):
    read, decoded = [], schemas.decode
    monkeypatch.setattr(schemas, "decode", lambda *part: read.append(1) or decoded(*part))
    draw(storage, "c", in_train, rare, 60.0, 1)  # a dozen of some 600 that are looked at
    assert len(read) < 8 * 10
