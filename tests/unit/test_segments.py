"""Are long recordings cut where nobody speaks, and is each piece read back as exactly its part of the recording?"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_ray.config.loading import load_recipe
from hubert_ray.config.recipe import Checks, EmbeddedCorpus, LibriSpeech, Segments
from hubert_ray.data import audio, synthetic, voice_activity
from hubert_ray.data.collate import UtteranceReader
from hubert_ray.data.corpora import open_source
from hubert_ray.data.frames import SAMPLE_RATE
from hubert_ray.data.segments import HOP, Cutter, plan_ranges, tidy
from hubert_ray.data.shards import AudioReader, Manifest, RawUtterance, index_shard, write_shard
from hubert_ray.errors import AudioError, CorpusError, RecipeError
from hubert_ray.storage.filesystem import Storage
from tests.corpora import write_corpus

CORPUS = "corpora/c"
TEN = Segments(max_seconds=10, min_seconds=0.5, max_pause_seconds=2)


def encoded(wave: np.ndarray, rate: int = SAMPLE_RATE, kind: str = "FLAC", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, 1, format=kind, subtype=subtype) as file:
        for start in range(0, len(wave), rate):  # libvorbis does not survive minutes at once
            file.write(wave[start : start + rate])
    return buffer.getvalue()


def noise(seconds: float, rate: int = SAMPLE_RATE, seed: int = 0) -> np.ndarray:
    return np.float32(0.1) * np.random.default_rng(seed).standard_normal(int(seconds * rate), dtype=np.float32)


def seconds(*regions: tuple[float, float]) -> np.ndarray:
    return np.round(np.array(regions).reshape(-1, 2) * SAMPLE_RATE).astype(np.int64)


def ranges(
    regions: np.ndarray, settings: Segments = TEN, levels_H: np.ndarray | None = None
) -> list[tuple[float, float]]:
    total = int(regions[-1, 1]) if len(regions) else 0
    levels_H = np.ones(total // HOP + 1) if levels_H is None else levels_H
    return [(a / SAMPLE_RATE, b / SAMPLE_RATE) for a, b in plan_ranges(regions, levels_H, 1, settings).tolist()]


# --- planning ---------------------------------------------------------------------------------------------------------


def test_what_fits_is_one_piece_from_first_to_last_speech():
    assert ranges(seconds((1, 4), (5, 9.5))) == [(1, 9.5)]
    assert ranges(seconds()) == []


def test_the_longest_pause_of_the_second_half_of_the_reach_is_cut_at():
    regions = seconds((0, 2), (3.5, 6), (6.9, 8), (8.4, 9), (9.3, 14))  # pauses of 1.5, 0.9, 0.4, 0.3 s
    assert ranges(regions) == [(0, 6), (6.9, 14)]
    assert ranges(seconds((0, 6), (6.5, 8), (8.5, 14))) == [(0, 8), (8.5, 14)]  # of equal pauses the later


def test_where_the_second_half_has_no_pause_one_of_the_first_is_taken_before_speech_is_cut():
    assert ranges(seconds((0, 1), (1.2, 3), (4, 12))) == [(0, 3), (4, 12)]


def test_a_long_pause_always_parts():
    assert ranges(seconds((0, 2), (4.5, 6))) == [(0, 2), (4.5, 6)]
    assert ranges(seconds((0, 2), (4, 6))) == [(0, 6)]


def test_speech_beyond_the_limit_is_cut_at_its_quietest():
    levels_H = np.ones(50 * 25)
    levels_H[50 * 7] = levels_H[50 * 16 + 10] = 0.1
    levels_H[50 * 3] = 0  # quieter, but before the second half of what may be one piece
    (_, first), (second, third), (fourth, end) = ranges(seconds((0, 25)), levels_H=levels_H)
    assert (first, third) == (7.01, 16.21)  # middle of the 20 ms
    assert (second, fourth, end) == (first, third, 25)


@st.composite
def _planned(draw):
    grid = draw(st.sampled_from([1, 2, 160, 640, 16_000]))
    lengths = draw(st.lists(st.tuples(st.integers(0, 60_000), st.integers(1, 400_000)), max_size=30))
    edges = np.cumsum(np.array(lengths, dtype=np.int64).ravel())
    total = int(edges[-1]) // grid * grid if len(edges) else 0
    chosen = Segments(
        max_seconds=draw(st.sampled_from([2.0, 5.03, 10.0, 30.0])),
        min_seconds=0.5,
        max_pause_seconds=draw(st.sampled_from([0.3, 2.0, 10.0])),
    )
    levels_H = np.random.default_rng(draw(st.integers(0, 9))).random(total // HOP + 1)
    return tidy(edges.reshape(-1, 2), total, grid), levels_H, grid, chosen


@settings(max_examples=300, deadline=None)
@given(_planned())
def test_ranges_hold_all_speech_and_cut_none_that_fits(planned):
    speech_R2, levels_H, grid, chosen = planned
    found = plan_ranges(speech_R2, levels_H, grid, chosen)
    flat = found.ravel()
    assert (flat % grid == 0).all()
    assert (found[:, 1] > found[:, 0]).all()
    assert (found[1:, 0] >= found[:-1, 1]).all()
    longest = chosen.max_seconds * SAMPLE_RATE
    assert (found[:, 1] - found[:, 0] <= longest).all()
    for start, end in speech_R2.tolist():
        covering = np.clip(found, start, end)
        assert (covering[:, 1] - covering[:, 0]).sum() == end - start  # with disjointness: each sample in exactly one
        inside = flat[(flat > start) & (flat < end)]
        assert not len(inside) or end - start > longest // grid * grid
    pauses = np.stack([speech_R2[:-1, 1], speech_R2[1:, 0]], axis=1)
    for start, end in pauses[pauses[:, 1] - pauses[:, 0] > chosen.max_pause_seconds * SAMPLE_RATE].tolist():
        assert not ((found[:, 0] < end) & (found[:, 1] > start)).any()
    edges = set(speech_R2.ravel().tolist())
    for place in set(flat.tolist()) - edges:  # a cut in speech ends one piece and begins the next
        assert place in found[:, 0]
        assert place in found[:, 1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-50, 5000), st.integers(-50, 5000))), st.sampled_from([1, 7, 160]))
def test_tidy_marks_the_same_samples(regions, grid):
    total = 4000 // grid * grid
    marked = np.zeros(total, dtype=bool)
    for start, end in np.clip(np.array(regions, dtype=np.int64).reshape(-1, 2), 0, total).tolist():
        if start // grid * grid < -(-end // grid) * grid:
            marked[start // grid * grid : -(-end // grid) * grid] = True
    tidied = tidy(np.array(regions, dtype=np.int64).reshape(-1, 2), total, grid)
    again = np.zeros(total, dtype=bool)
    for start, end in tidied.tolist():
        again[start:end] = True
    assert np.array_equal(again, marked)
    assert (np.diff(tidied.ravel()) > 0).all()


def test_ten_hours_are_planned_in_little_memory():
    rng = np.random.default_rng(0)
    edges = np.cumsum(rng.integers(3_000, 40_000, size=60_000))
    edges = (edges * (36_000 * SAMPLE_RATE / edges[-1])).astype(np.int64)
    levels_H = rng.random(36_000 * 50, dtype=np.float32)
    tracemalloc.start()
    found = plan_ranges(edges.reshape(-1, 2), levels_H, 1, Segments())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) > 1200
    assert peak < 10 * 2**20


# --- from a recording to rows and back --------------------------------------------------------------------------------


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path / "s"))


def recording(
    wave: np.ndarray, speech: list[tuple[float, float]] | None, rate: int = SAMPLE_RATE, **fields
) -> RawUtterance:
    return RawUtterance("talk", "s1", "train", "flac", encoded(wave, rate), speech=speech, **fields)


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("OGG", "VORBIS")],
)
def test_a_piece_is_the_slice_of_the_whole_bit_for_bit(storage, kind, subtype):
    wave = noise(25)
    raw = RawUtterance("talk", "s1", "train", kind.lower(), encoded(wave, kind=kind, subtype=subtype),
                       speech=[(0.5, 4), (4.5, 9.7), (10, 14), (14.1, 23.999)])  # fmt: skip
    tables = write_shard(storage, CORPUS, "train-00000", [raw], segments=TEN)
    whole_S = audio.decode(raw.audio)
    reader = UtteranceReader(AudioReader(storage, CORPUS), Manifest(tables.manifest), normalize=False)
    assert tables.manifest.num_rows == 3
    for row, fields in enumerate(tables.manifest.to_pylist()):
        wave_S = reader.wave(row)
        assert np.array_equal(wave_S, whole_S[fields["first"] : fields["first"] + fields["stored_samples"]])
        assert len(wave_S) == fields["samples"] == fields["stored_samples"]
    with tarfile.open(fileobj=io.BytesIO(storage.read(f"{CORPUS}/audio/train-00000.tar"))) as tar:
        assert tar.getnames() == [f"talk.{kind.lower()}"]
        assert tar.extractfile(tar.getnames()[0]).read() == raw.audio


def test_a_piece_of_opus_is_in_its_place_and_the_same_each_time():
    pytest.importorskip("espeakng_loader")  # it takes a voice: Opus predicts from pitch, and so remembers
    corpus = EmbeddedCorpus(train_speakers=1, dev_speakers=0, test_speakers=0, utterances_per_speaker=6)
    (speaker,) = synthetic.speakers(corpus)
    sentences = [soundfile.read(io.BytesIO(u.flac), dtype="float32")[0] for u in synthetic.synthesise(speaker, corpus)]
    data = encoded(np.concatenate(sentences), kind="OGG", subtype="OPUS")
    whole_S = audio.decode(data)
    for first in (0, 7, 33_333, 123_457):
        piece_S = audio.decode_range(io.BytesIO(data), first, 48_000)
        assert np.array_equal(piece_S, audio.decode_range(io.BytesIO(data), first, 48_000))
        assert np.abs(piece_S - whole_S[first : first + 48_000]).max() < 1e-4
        assert np.abs(piece_S - whole_S[first + 1 : first + 48_001]).max() > 1e-2


def test_mp3_stays_whole_or_is_refused(storage):
    short, long = (
        RawUtterance(f"{n}", "s1", "train", "mp3", encoded(noise(n), kind="MP3"), speech=[(1, 4)]) for n in (9, 12)
    )
    tables = write_shard(storage, CORPUS, "train-00000", [short, long], segments=TEN)
    assert tables.manifest["utterance_id"].to_pylist() == ["9"]
    (told,) = tables.quarantine.to_pylist()
    assert (told["source"], told["reason"]) == ("12", "not_seekable")
    assert "encode it as" in told["detail"]


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100])
def test_pieces_of_other_rates_are_whole_numbers_of_samples_at_both(storage, rate):
    raw = recording(noise(25, rate), [(0.3, 9.7), (10.013, 14), (14.1, 23.99)], rate)
    tables = write_shard(storage, CORPUS, "train-00000", [raw], segments=TEN)
    whole_S = audio.decode(raw.audio)
    rows = tables.manifest.to_pylist()
    assert len(rows) == 3
    for row in rows:
        assert row["stored_samples"] * SAMPLE_RATE == row["samples"] * rate
        wave_S = AudioReader(storage, CORPUS).wave(
            row["shard"], row["offset"], row["size"], row["first"], row["stored_samples"]
        )
        assert len(wave_S) == row["samples"]
        start = row["first"] * SAMPLE_RATE // rate
        difference_S = np.abs(wave_S - whole_S[start : start + row["samples"]])
        assert difference_S[20:-20].max() < 1e-4  # resampled by itself: only the ends know
        assert row["samples"] <= 10 * SAMPLE_RATE


def test_rows_of_a_cut_recording(storage):
    phones = [(0, 16_000, "SIL"), (16_000, 60_000, "AA"), (60_000, 130_000, "B"), (130_000, 399_000, "K")]
    raw = recording(noise(25), [(1, 4), (7, 8), (13, 18.5)], text="WORDS", phones=phones)
    short = RawUtterance("short", "s2", "dev", "flac", encoded(noise(9.9)), text="KEPT", phones=[(0, 99, "X")])
    tables = write_shard(storage, CORPUS, "train-00000", [raw, short], segments=TEN)
    one, two, three, whole = tables.manifest.to_pylist()
    assert [row["utterance_id"] for row in (one, two, three, whole)] == [
        "talk-00001000-00004000",
        "talk-00007000-00008000",
        "talk-00013000-00018500",
        "short",
    ]
    assert {(row["offset"], row["size"]) for row in (one, two, three)} == {(512, len(raw.audio))}
    assert (two["first"], two["stored_samples"], two["samples"], two["speech_share"]) == (112_000, 16_000, 16_000, 1)
    assert (one["speaker"], one["split"], one["text"]) == ("s1", "train", None)
    assert one["phones"] == [{"start": 0, "end": 44_000, "phone": "AA"}, {"start": 44_000, "end": 48_000, "phone": "B"}]
    assert (whole["first"], whole["stored_samples"], whole["speech_share"], whole["text"]) == (0, -1, None, "KEPT")
    assert whole["phones"] == [{"start": 0, "end": 99, "phone": "X"}]
    assert tables.quarantine.num_rows == 0
    train = tables.manifest.slice(0, 3)
    index = write_corpus(storage, CORPUS, {"train-00000": train, "train-00001": train.slice(0, 1)})
    assert index.begin_recordings(np.arange(4)).tolist() == [True, False, False, True]
    assert index.audio_bytes() == 2 * len(raw.audio)


def test_a_tar_that_stays_where_it_is_is_cut_the_same_way(storage):
    raw = recording(noise(25), [(1, 4), (7, 8), (13, 18.5)], text="WORDS")
    written = write_shard(storage, CORPUS, "train-00000", [raw], segments=TEN)
    in_place = replace(raw, offset=written.manifest["offset"][0].as_py())
    assert index_shard("train-00000", [in_place], checks=Checks(), segments=TEN).manifest.equals(written.manifest)


def test_text_stays_where_one_piece_has_all_the_speech(storage):
    raw = recording(noise(12), [(1, 4), (5, 9)], text="WORDS")
    (row,) = write_shard(storage, CORPUS, "train-00000", [raw], segments=TEN).manifest.to_pylist()
    assert (row["utterance_id"], row["text"]) == ("talk-00001000-00009000", "WORDS")
    assert row["speech_share"] == pytest.approx(7 / 8)


def test_what_is_too_short_is_counted_in_the_quarantine(storage):
    raw = recording(noise(12), [(1, 4), (7, 7.2), (10, 10.4)], text="WORDS")
    tables = write_shard(storage, CORPUS, "train-00000", [raw], segments=TEN)
    (row,) = tables.manifest.to_pylist()
    assert (row["utterance_id"], row["text"]) == ("talk-00001000-00004000", None)  # words may be in what was left out
    (told,) = tables.quarantine.to_pylist()
    assert (told["source"], told["reason"]) == ("talk", "short_pieces")
    assert told["detail"] == "2 pieces below 0.5 s, 0.6 s in all, were left out"


def test_pieces_are_no_shorter_than_the_corpus_allows(storage):
    raw = recording(noise(14), [(1, 4), (7, 12)])
    tables = write_shard(storage, CORPUS, "train-00000", [raw], checks=Checks(min_seconds=4), segments=TEN)
    assert tables.manifest["utterance_id"].to_pylist() == ["talk-00007000-00012000"]
    assert tables.quarantine["detail"].to_pylist() == ["1 pieces below 4 s, 3.0 s in all, were left out"]


@pytest.mark.parametrize(
    ("wave", "speech", "reason"),
    [
        (noise(12), [], "no_speech"),
        (noise(12), [(3, 3.3)], "no_speech"),
        (noise(12), [(20, 30)], "no_speech"),  # of another recording
        (np.full(12 * SAMPLE_RATE, 0.25), [(3, 6)], "silent"),
    ],
)
def test_nothing_to_keep_of_a_long_recording(storage, wave, speech, reason):
    tables = write_shard(storage, CORPUS, "train-00000", [recording(wave, speech)], segments=TEN)
    assert tables.manifest.num_rows == 0
    assert tables.quarantine["reason"].to_pylist() == [reason]


def test_damage_anywhere_sets_the_whole_recording_aside(storage):
    data = bytearray(encoded(noise(130)))
    data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    broken = RawUtterance("talk", "s1", "train", "flac", bytes(data), speech=[(0, 5)])
    nan = noise(12)
    nan[-1] = np.nan
    unclean = RawUtterance("nan", "s1", "train", "wav", encoded(nan, kind="WAV", subtype="FLOAT"), speech=[(0, 5)])
    tables = write_shard(storage, CORPUS, "train-00000", [broken, unclean], segments=TEN)
    assert tables.quarantine["reason"].to_pylist() == ["undecodable", "not_finite"]


def test_an_id_that_a_piece_has_taken_is_refused(storage):
    taken = RawUtterance("talk-00001000-00004000", "s1", "train", "flac", encoded(noise(1)))
    tables = write_shard(storage, CORPUS, "train-00000", [recording(noise(12), [(1, 4)]), taken, taken], segments=TEN)
    assert tables.manifest["utterance_id"].to_pylist() == [taken.utterance_id]
    assert tables.quarantine["reason"].to_pylist() == ["duplicate_id", "duplicate_id"]


def test_a_recording_that_comes_again_under_another_name_is_a_duplicate(storage):
    talk, wave = [(1, 4), (5, 9)], (2000 * noise(12)).astype(np.int16)
    again = RawUtterance("again", "s2", "dev", "wav", encoded(wave, kind="WAV"), speech=talk)
    tables = write_shard(storage, CORPUS, "train-00000", [recording(wave, talk), again], segments=TEN)
    assert tables.manifest.num_rows == len(set(tables.manifest["digest"].to_pylist())) == 1
    assert tables.quarantine["reason"].to_pylist() == ["duplicate_content"]


def test_where_text_is_required_what_cannot_keep_its_own_is_set_aside(storage):
    checks = Checks(require_text=True)
    kept = recording(noise(12), [(1, 4), (5, 9)], text="WORDS")
    split = RawUtterance("two", "s1", "train", "flac", encoded(noise(25)), text="WORDS", speech=[(1, 4), (7, 18)])
    tables = write_shard(storage, CORPUS, "train-00000", [kept, split], checks=checks, segments=TEN)
    assert tables.manifest["text"].to_pylist() == ["WORDS"]
    assert tables.quarantine["reason"].to_pylist() == ["no_text"]


def test_without_the_setting_a_long_recording_is_set_aside_and_the_way_out_named(storage):
    tables = write_shard(storage, CORPUS, "train-00000", [recording(noise(121), [(1, 4)])])
    (told,) = tables.quarantine.to_pylist()
    assert told["reason"] == "too_long"
    assert "corpus.segments" in told["detail"]


# --- bounded reading --------------------------------------------------------------------------------------------------


class Counting(Storage):
    """Notes the ranges that are read."""

    def open(self, path):
        inner = super().open(path)
        self.noted = noted = []

        class File:
            def read_at(self, size, offset):
                noted.append((offset, size))
                return inner.read_at(size, offset)

        return File()


@pytest.mark.parametrize("kind", ["FLAC", "WAV"])
def test_a_piece_far_inside_costs_its_own_bytes_only(storage, kind):
    data = encoded(noise(240), kind=kind)
    raw = RawUtterance("talk", "s1", "train", kind.lower(), data, speech=[(1, 5), (200, 210)])
    row = write_shard(storage, CORPUS, "train-00000", [raw], segments=TEN).manifest.to_pylist()[-1]
    counting = Counting(storage.url)
    wave_S = AudioReader(counting, CORPUS).wave(
        "train-00000", row["offset"], row["size"], row["first"], row["stored_samples"]
    )
    assert np.array_equal(wave_S, audio.decode_range(io.BytesIO(data), 200 * SAMPLE_RATE, 10 * SAMPLE_RATE))
    ten_seconds = len(data) * 10 // 240
    fetched = sum(size for _, size in counting.noted)
    assert fetched < ten_seconds + 5 * 2**17 < len(data) / 4, (fetched, ten_seconds, len(data))
    assert len(counting.noted) == len(set(counting.noted))
    assert all(row["offset"] <= at and at + size <= row["offset"] + row["size"] for at, size in counting.noted)


def test_storage_that_fails_is_not_taken_for_a_damaged_recording(storage):
    raw = recording(noise(60), [(1, 5), (50, 55)])
    row = write_shard(storage, CORPUS, "train-00000", [raw], segments=TEN).manifest.to_pylist()[-1]
    place = (row["shard"], row["offset"], row["size"], row["first"], row["stored_samples"])
    path = f"{CORPUS}/audio/train-00000.tar"
    storage.write(path, storage.read(path)[: row["size"] // 2])
    with pytest.raises(CorpusError, match="was cut short or replaced"):
        AudioReader(storage, CORPUS).wave(*place)
    storage.delete(path)
    with pytest.raises(CorpusError, match="is missing"):
        AudioReader(storage, CORPUS).wave(*place)


def test_a_range_beyond_the_end_is_an_error():
    with pytest.raises(AudioError, match="undecodable"):
        audio.decode_range(io.BytesIO(encoded(noise(2))), 30_000, 4000)


@pytest.mark.parametrize("rate", [16_000, 8_000])
def test_a_long_recording_is_heard_and_known_as_a_whole(rate):
    data, blocks = encoded(noise(130, rate), rate), []
    known = audio.examine_long(data, Checks(), blocks.append)
    assert [len(block_S) for block_S in blocks] == [960_000, 960_000, 160_000]
    assert known == audio.examine(data, Checks(max_seconds=200))
    reference_S = audio.decode(data)
    assert np.quantile(np.abs(np.concatenate(blocks) - reference_S), 0.999) < 1e-6


@pytest.mark.slow
def test_ten_hours_are_cut_in_bounded_memory(tmp_path):
    """A process of its own, whose peak beyond the compressed bytes must not grow with the recording."""
    script = (
        "import io, resource, sys, numpy as np, soundfile\n"
        "from hubert_ray.config.recipe import Checks, Segments\n"
        "from hubert_ray.data.segments import Cutter\n"
        "rng = np.random.default_rng(0)\n"
        "minute = (1000 * rng.standard_normal(60 * 8000)).astype(np.int16)\n"
        "minute[np.arange(len(minute)) % 48000 > 40000] = 0\n"
        "cutter = Cutter(Segments(), Checks())\n"
        "for minutes in (10, 600):\n"
        "    buffer = io.BytesIO()\n"
        "    with soundfile.SoundFile(buffer, 'w', 8000, 1, format='WAV', subtype='ULAW') as file:\n"
        "        for _ in range(minutes):\n"
        "            file.write(minute)\n"
        "    data = buffer.getvalue()\n"
        "    del buffer\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    speech = [(6 * n, 6 * n + 5) for n in range(minutes * 10)]\n"
        "    pieces = cutter.cut(data, speech).pieces\n"
        "    print(minutes, len(pieces), len(data), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (_, few, small, first), (_, many, large, second) = [map(int, line.split()) for line in done.stdout.splitlines()]
    assert many == pytest.approx(60 * few, rel=0.02)
    # Two copies of the file are the script's own doing (the buffer and its value).
    assert second - first < 2.2 * (large - small) + 64 * 2**20


# --- voice activity ---------------------------------------------------------------------------------------------------


def test_libri_lights_own_voice_activity_is_used(tmp_path, storage, monkeypatch):
    monkeypatch.setitem(sys.modules, "silero_vad", None)  # must not be needed
    folder = tmp_path / "small" / "77" / "a_book"
    folder.mkdir(parents=True)
    for name, metadata in {
        "one_64kb": '{"speaker": "77", "snr": 5.3, "voice_activity": [[0.4, 5.12], [5.5, 11.9]]}',
        "two_64kb": '{"voice_activity": [[3.0, 2.0]]}',
        "three_64kb": "{",
    }.items():
        (folder / f"{name}.flac").write_bytes(encoded(noise(12)))
        (folder / f"{name}.json").write_text(metadata)
    source = open_source(LibriSpeech(name="c", path=str(tmp_path), segments=TEN))
    read = [item for group in source.groups() for item in source.read(group)]
    speech = {item.utterance_id: item.speech for item in read if isinstance(item, RawUtterance)}
    assert speech == {
        "77/a_book/one_64kb": [(0.4, 5.12), (5.5, 11.9)],
        "77/a_book/two_64kb": None,
        "77/a_book/three_64kb": None,
    }
    rejected = {item.source: item.reason for item in read if not isinstance(item, RawUtterance)}
    assert rejected == {"two_64kb.json": "bad_metadata", "three_64kb.json": "bad_metadata"}
    good = [item for item in read if isinstance(item, RawUtterance) and item.speech]
    rows = write_shard(storage, CORPUS, "train-00000", good, segments=TEN).manifest["utterance_id"].to_pylist()
    assert rows == [f"77/a_book/one_64kb-{span}" for span in ("00000400-00005120", "00005500-00011900")]


def test_without_the_library_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    with pytest.raises(CorpusError, match=r"pip install 'hubert-ray\[vad\]'"):
        Cutter(TEN, Checks()).cut(encoded(noise(12)), None)


def test_the_detector_hears_a_stream_as_it_hears_the_whole():
    pytest.importorskip("silero_vad")
    speech_S = 0.3 * np.sin(np.cumsum(0.05 + 0.02 * np.random.default_rng(0).random(40_960)))
    detector = voice_activity.VoiceActivity()
    chances = []
    for block in (40_960, 512, 10_240):
        detector.begin()
        for start in range(0, len(speech_S), block):
            detector.hear(speech_S[start : start + block].astype(np.float32))
        chances.append(np.concatenate(detector._heard))
    assert np.array_equal(chances[0], chances[1])
    assert np.array_equal(chances[0], chances[2])


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_off_until_named_and_are_checked():
    def load(*overrides: str):
        return load_recipe(
            "demo", ["corpus.kind=folder", "corpus.name=x", "corpus.path=/x", *overrides]
        ).corpus.segments

    assert load() is None
    assert load("corpus.segments={}") == Segments()
    assert load("corpus.segments.max_seconds=20") == Segments(max_seconds=20)
    for wrong in ("max_seconds=1", "max_seconds=121", "min_seconds=31", "max_pause_seconds=0"):
        with pytest.raises(RecipeError, match="segments"):
            load(f"corpus.segments.{wrong}")
