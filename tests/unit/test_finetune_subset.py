"""Which transcripts may fine-tuning see, and which settings does the sweep try?"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from hubert_ray.asr import letters
from hubert_ray.asr.transcripts import labelled_subset, read_transcribed, spellable, spelled_texts
from hubert_ray.config.recipe import Finetune, Sweep
from hubert_ray.data.shards import WHOLE, Manifest
from hubert_ray.stages.finetune import Choice, draw_choices
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage
from tests.corpora import write_corpus

# --- transcripts ------------------------------------------------------------------------------------------------------


def manifest_of(rows: list[dict]) -> Manifest:
    return Manifest(pa.Table.from_pylist(rows, schema=schemas.MANIFEST))


def stored(folder: Path, rows: list[dict], shards: int = 1) -> Storage:
    """A corpus "c" of such train utterances, dealt to so many shards."""
    usual = {"speaker": "s", "offset": 0, "size": 1, "sample_rate_hz": 16_000, "split": "train"} | WHOLE
    names = [f"train-{number:05d}" for number in range(shards)]
    parts = {
        name: manifest_of([usual | {"shard": name} | row for row in rows[number::shards]])
        for number, name in enumerate(names)
    }
    storage = Storage(str(folder))
    write_corpus(storage, "c", {name: part.table for name, part in parts.items()})
    return storage


def corpus(count: int = 200) -> list[dict]:
    """Train utterances of 1 to 5 s; every fifth has no text, every seventh one that cannot be spelled."""
    rng = np.random.default_rng(1)
    rows = []
    for n in range(count):
        text = None if n % 5 == 0 else "ROOM 101" if n % 7 == 0 else "HELLO THERE"
        rows.append({"utterance_id": f"u{n:03d}", "samples": int(rng.integers(16_000, 80_000)), "text": text})
    return rows


def ids(manifest: Manifest) -> list[str]:
    return manifest.table["utterance_id"].to_pylist()


def subset(storage: Storage, **settings) -> Manifest:
    return labelled_subset(storage, "c", Finetune(**settings))


def usable() -> list[str]:
    return [f"u{n:03d}" for n in range(200) if n % 5 and n % 7]


@pytest.mark.parametrize("seconds", [4.9, 30.0, 100.0])
def test_subset_fills_the_seconds_and_no_more(tmp_path, seconds):
    found = subset(stored(tmp_path, corpus(), 3), label_seconds=seconds)
    held = found.numbers("samples").sum() / 16_000
    assert seconds - 5 <= held <= seconds  # no utterance is longer than 5 s
    assert set(ids(found)) <= set(usable())
    assert len(set(ids(found))) == len(found)


def test_subset_is_all_where_there_is_less_than_asked_for(tmp_path):
    assert sorted(ids(subset(stored(tmp_path, corpus(), 3), label_seconds=1e6))) == usable()


def test_subset_may_fill_the_seconds_exactly(tmp_path):
    storage = stored(tmp_path, [{"utterance_id": f"u{n}", "samples": 16_000, "text": "A"} for n in range(10)])
    assert len(subset(storage, label_seconds=3)) == 3
    assert len(subset(storage, label_seconds=0.5)) == 0


@pytest.mark.parametrize("texts", [[], [None, None], ["ROOM 101"]])
def test_nothing_spellable_is_an_empty_subset(tmp_path, texts):
    rows = [{"utterance_id": f"u{n}", "samples": 500, "text": text} for n, text in enumerate(texts)]
    assert len(subset(stored(tmp_path, rows))) == 0
    kept, spelled = spellable(manifest_of(rows))
    assert (len(kept), spelled) == (0, [])


def test_subset_is_drawn_by_seed(tmp_path):
    storage = stored(tmp_path, corpus(), 3)
    first, again, other = (ids(subset(storage, label_seconds=60, seed=s)) for s in (0, 0, 1))
    assert first == again
    assert set(first) != set(other)
    assert sorted(first) != usable()[: len(first)]  # drawn, not the head of the corpus


def test_a_larger_subset_holds_the_smaller(tmp_path):
    storage = stored(tmp_path, corpus(), 3)
    small, large = (ids(subset(storage, label_seconds=s)) for s in (30, 90))
    assert len(small) < len(large)
    assert small == large[: len(small)]


def test_only_the_parts_of_drawn_utterances_are_read(tmp_path, monkeypatch):
    """Ten minutes of 60,000 hours are a few hundred utterances: neither the other parts nor other transcripts are looked at."""
    rows = [{"utterance_id": f"u{n}", "samples": 16_000, "text": "A"} for n in range(400)]
    storage = stored(tmp_path, rows, shards=100)
    read, spelled = [], []
    decoded, normalised = schemas.decode, letters.normalise
    monkeypatch.setattr(schemas, "decode", lambda *part: read.append(1) or decoded(*part))
    monkeypatch.setattr(letters, "normalise", lambda text: spelled.append(1) or normalised(text))
    assert len(subset(storage, label_seconds=5)) == 5
    assert len(read) <= len(spelled) == 5


def test_texts_are_read_a_shard_at_a_time(tmp_path):
    """A language model of 60,000 hours of transcripts must not hold them."""
    storage = stored(tmp_path, corpus(20), shards=2)
    texts = spelled_texts(storage, "c", "train")
    assert next(texts) == "HELLO THERE"
    storage.delete(f"c/{layout.manifest_part('train-00001')}")
    with pytest.raises(FileNotFoundError):
        list(texts)
    assert list(spelled_texts(stored(tmp_path, corpus(20), 2), "c", "train")) == ["HELLO THERE"] * 14


def test_spellable_drops_digits_and_keeps_texts_with_their_utterances():
    texts = ["Hello, there", None, "ROOM 101", "naïve café", "50 %", "it's", "привет", "WORD"]
    manifest = manifest_of([{"utterance_id": f"u{n}", "text": text} for n, text in enumerate(texts)])
    kept, spelled = spellable(manifest)
    assert ids(kept) == ["u0", "u3", "u5", "u7"]
    assert spelled == ["HELLO THERE", "NAIVE CAFE", "IT'S", "WORD"]


def test_only_parts_that_have_transcripts_are_read(tmp_path):
    """Of 200 million utterances a few hours may have text: the others' parts are not even opened."""
    whole = {"speaker": "s", "offset": 0, "size": 1, "samples": 16_000, "sample_rate_hz": 16_000} | WHOLE

    def part(split: str, **texts: str | None) -> pa.Table:
        rows = [whole | {"utterance_id": name, "split": split, "text": text} for name, text in texts.items()]
        return pa.Table.from_pylist(rows, schema=schemas.MANIFEST)

    storage = Storage(str(tmp_path))
    parts = {
        "train-00000": part("train", a="A", b=None),
        "train-00001": part("train", c=None),
        "dev-00000": part("dev", d="D"),
    }
    write_corpus(storage, "c", parts)
    storage.delete(f"c/{layout.manifest_part('train-00001')}")
    assert ids(read_transcribed(storage, "c", "train")) == ["a"]
    assert ids(read_transcribed(storage, "c", "dev")) == ["d"]
    assert ids(read_transcribed(storage, "c", "test")) == []


# --- the sweep --------------------------------------------------------------------------------------------------------

SWEEP = Sweep(trials=8, peak_lr=(1e-5, 1e-3), freeze_share=(0.1, 0.5), mask_prob=(0.4, 0.8), seed=3)


def strata(values: list[float], low: float, high: float) -> list[int]:
    """Which of the equal parts of the range each value lies in."""
    return [int((value - low) / (high - low) * len(values)) for value in values]


@pytest.mark.parametrize("seed", range(5))
def test_each_setting_is_drawn_once_from_each_stratum(seed):
    choices = draw_choices(msgspec.structs.replace(SWEEP, seed=seed), "pretrained")
    rates = strata([np.log(choice.peak_lr) for choice in choices], np.log(1e-5), np.log(1e-3))
    freezes = strata([choice.freeze_share for choice in choices], 0.1, 0.5)
    masks = strata([choice.mask_prob for choice in choices], 0.4, 0.8)
    assert sorted(rates) == sorted(freezes) == sorted(masks) == list(range(8))
    assert len({tuple(rates), tuple(freezes), tuple(masks), tuple(range(8))}) == 4  # shuffled, each on its own


def test_choices_are_the_seeds_and_plain_numbers():
    choices = draw_choices(SWEEP, "pretrained")
    assert choices == draw_choices(SWEEP, "pretrained")
    assert choices != draw_choices(msgspec.structs.replace(SWEEP, seed=4), "pretrained")
    assert msgspec.json.decode(msgspec.json.encode(choices), type=list[Choice]) == choices


def test_scratch_is_never_frozen_and_else_drawn_alike():
    scratch, pretrained = draw_choices(SWEEP, "scratch"), draw_choices(SWEEP, "pretrained")
    assert {choice.freeze_share for choice in scratch} == {0.0}
    assert [(c.peak_lr, c.mask_prob) for c in scratch] == [(c.peak_lr, c.mask_prob) for c in pretrained]
    assert all(0.1 <= choice.freeze_share <= 0.5 for choice in pretrained)


def test_a_range_of_one_value_is_that_value():
    fixed = Sweep(trials=2, peak_lr=(1e-4, 1e-4), freeze_share=(0.25, 0.25), mask_prob=(0.5, 0.5))
    for choice in draw_choices(fixed, "pretrained"):
        assert choice.peak_lr == pytest.approx(1e-4)
        assert (choice.freeze_share, choice.mask_prob) == (0.25, 0.5)
