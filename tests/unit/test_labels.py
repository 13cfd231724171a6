"""Does every frame get its own label: joined by id, checked against the audio, cut together with the waveform?"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from hubert_ray.config.recipe import Checks
from hubert_ray.data import labels as labels_module
from hubert_ray.data.audio import normalise
from hubert_ray.data.batching import MicroBatch
from hubert_ray.data.collate import UtteranceReader, pad
from hubert_ray.data.frames import crop_labels, frames_of, mfcc_frames_of, samples_of
from hubert_ray.data.index import Index
from hubert_ray.data.labels import LabelStore
from hubert_ray.data.shards import WHOLE, AudioReader, RawUtterance, write_shard
from hubert_ray.errors import LabelError
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage
from tests.corpora import write_corpus

RATES = pytest.mark.parametrize("rate", [50, 100])
CORPUS = "corpora/c"
SAMPLES = {"a": 16_000, "b": 5_000, "c": 400, "d": 40_123, "e": 12_345}
SHARDS = {"a": "train-00000", "b": "train-00000", "c": "train-00001", "d": "train-00001", "e": "train-00001"}
BASES = {name: 1000 * number for number, name in enumerate(SAMPLES)}  # a label is its utterance's base + its frame


@pytest.fixture
def index(storage) -> Index:
    return corpus_of(storage, "abcde")


def corpus_of(storage: Storage, names: str) -> Index:
    """Its utterances, in this order within each shard; no audio."""
    whole = {"speaker": "s", "split": "train", "offset": 0, "size": 1, "sample_rate_hz": 16_000} | WHOLE
    rows: dict[str, list[dict]] = {shard: [] for shard in sorted({SHARDS[name] for name in names})}
    for name in names:
        rows[SHARDS[name]].append(whole | {"utterance_id": name, "shard": SHARDS[name], "samples": SAMPLES[name]})
    tables = {shard: pa.Table.from_pylist(found, schema=schemas.MANIFEST) for shard, found in rows.items()}
    return write_corpus(storage, CORPUS, tables)


def ids_of(index: Index, storage: Storage) -> list[str]:
    return [index.id_of(storage, CORPUS, row) for row in range(len(index))]


def labels_of(name: str, rate: int) -> np.ndarray:
    count = frames_of(SAMPLES[name]) if rate == 50 else mfcc_frames_of(SAMPLES[name])
    return (BASES[name] + np.arange(count)).astype(np.uint16)


def write(storage: Storage, rate: int, parts: dict[str, list[tuple[str, np.ndarray]]]) -> None:
    for shard, rows in parts.items():
        table = pa.Table.from_pylist(
            [{"utterance_id": name, "labels": labels, "frame_rate_hz": rate} for name, labels in rows],
            schema=schemas.LABELS,
        )
        storage.write(f"labels/{layout.part(shard)}", schemas.encode(table))


def parts_of(order: str, rate: int) -> dict[str, list[tuple[str, np.ndarray]]]:
    parts: dict[str, list[tuple[str, np.ndarray]]] = {shard: [] for shard in sorted(set(SHARDS.values()))}
    for name in order:
        parts[SHARDS[name]].append((name, labels_of(name, rate)))
    return parts


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path))


# --- the join ---------------------------------------------------------------------------------------------------------


@RATES
@pytest.mark.parametrize("order", ["abcde", "edcba", "cbead"])
@pytest.mark.parametrize("rows", ["abcde", "dbeca"])
def test_labels_are_joined_by_id_whatever_the_order_of_rows(storage, rate, order, rows):
    index = corpus_of(storage, rows)
    write(storage, rate, parts_of(order, rate))
    store = LabelStore(storage, CORPUS, "labels", index, rate)
    for row, name in enumerate(ids_of(index, storage)):
        assert store.window(row, slice(None)).dtype == np.uint16
        assert store.window(row, slice(None))[:, 0].tolist() == labels_of(name, rate).tolist()


@pytest.mark.parametrize("rows_a_place", [1, 2, 1024])
def test_an_utterances_place_is_added_up_from_a_known_one(storage, index, rows_a_place, monkeypatch):
    monkeypatch.setattr(labels_module, "_ROWS_A_PLACE", rows_a_place)
    write(storage, 50, parts_of("abcde", 50))
    store = LabelStore(storage, CORPUS, "labels", index, 50)
    for row, name in enumerate("abcde"):
        assert store.window(row, slice(None))[:, 0].tolist() == labels_of(name, 50).tolist()


def test_labels_of_one_split(storage):
    """A split is a range of the index; labels of other shards are not even read."""
    dev = pa.Table.from_pylist(
        [{"utterance_id": "a", "speaker": "s", "split": "dev", "shard": "dev-00000", "offset": 0, "size": 1,
          "samples": 5000, "sample_rate_hz": 16_000} | WHOLE], schema=schemas.MANIFEST,
    )  # fmt: skip
    train = dev.set_column(0, "utterance_id", pa.array(["b"])).set_column(2, "split", pa.array(["train"]))
    index = write_corpus(storage, CORPUS, {"train-00000": train, "dev-00000": dev})
    write(storage, 50, {"dev-00000": [("a", np.arange(15))]})
    store = LabelStore(storage, CORPUS, "labels", index.split("dev"), 50)
    assert store.window(0, slice(None))[:, 0].tolist() == list(range(15))


@pytest.mark.parametrize(
    "change", [lambda labels: labels[:-1], lambda labels: np.append(labels, 1), lambda labels: labels[:0]]
)
def test_another_number_of_labels_is_refused(storage, index, change):
    parts = parts_of("abcde", 50)
    parts["train-00001"] = [(name, change(labels) if name == "d" else labels) for name, labels in parts["train-00001"]]
    write(storage, 50, parts)
    with pytest.raises(LabelError, match=r"'d' has \d+ labels; its audio has 125 frames at 50 Hz"):
        LabelStore(storage, CORPUS, "labels", index, 50)


def test_missing_labels_are_refused(storage, index):
    write(storage, 50, parts_of("abd", 50))
    with pytest.raises(LabelError, match="2 of 3 utterances of shard train-00001 have no labels, 'c' for one"):
        LabelStore(storage, CORPUS, "labels", index, 50)


def test_labels_twice_are_refused(storage, index):
    write(storage, 50, parts_of("abcdeb", 50))
    with pytest.raises(LabelError, match="'b' has 15 labels a second time"):
        LabelStore(storage, CORPUS, "labels", index, 50)


def test_labels_of_another_corpus_are_refused(storage):
    index = corpus_of(storage, "abcd")
    write(storage, 50, parts_of("abcde", 50))
    with pytest.raises(LabelError, match=r"shard train-00001: \['e'\] is not in the index"):
        LabelStore(storage, CORPUS, "labels", index, 50)


def test_a_manifest_part_that_was_replaced_is_refused(storage, index):
    corpus_of(storage, "abcd")
    write(storage, 50, parts_of("abcd", 50))
    with pytest.raises(LabelError, match="train-00001: the manifest part is not in the index"):
        LabelStore(storage, CORPUS, "labels", index, 50)


@RATES
def test_another_frame_rate_is_refused(storage, index, rate):
    write(storage, rate, parts_of("abcde", rate))
    with pytest.raises(LabelError, match=rf"at \[{rate}\] Hz, expected {150 - rate} Hz"):
        LabelStore(storage, CORPUS, "labels", index, 150 - rate)


def test_two_rates_in_one_part_are_refused(storage, index):
    write(storage, 50, parts_of("abcde", 50))
    part = f"labels/{layout.part('train-00000')}"
    table = schemas.decode(storage.read(part))
    mixed = table.set_column(2, "frame_rate_hz", pa.array([50, 100], pa.int16()))
    storage.write(part, schemas.encode(mixed))
    with pytest.raises(LabelError, match=r"at \[50, 100\] Hz"):
        LabelStore(storage, CORPUS, "labels", index, 50)


@RATES
def test_labels_of_chunked_and_sliced_tables(storage, index, rate, monkeypatch):
    """Parquet readers may hand a column over in several chunks, and a chunk may be a window on a larger array."""
    write(storage, rate, parts_of("abcde", rate))
    decode = schemas.decode

    def in_pieces(data: bytes, columns: list[str] | None = None) -> pa.Table:
        table = decode(data, columns)
        if columns:  # the ids of the corpus
            return table
        return pa.concat_tables([table.slice(1), table.slice(0, 0), table.slice(0, 1)])

    monkeypatch.setattr(schemas, "decode", in_pieces)
    store = LabelStore(storage, CORPUS, "labels", index, rate)
    for row, name in enumerate("abcde"):
        assert store.window(row, slice(None))[:, 0].tolist() == labels_of(name, rate).tolist()


def two_streams(name: str, rate: int) -> np.ndarray:
    """(F, 2): the label of `labels_of`, and beside it 7 more."""
    return labels_of(name, rate)[:, None] + np.array([0, 7], dtype=np.uint16)


def write_two_streams(storage: Storage, rate: int) -> None:
    parts = parts_of("edcba", rate)
    write(storage, rate, {s: [(n, two_streams(n, rate).ravel()) for n, _ in rows] for s, rows in parts.items()})


@RATES
def test_streams_lie_side_by_side(storage, index, rate):
    write_two_streams(storage, rate)
    store = LabelStore(storage, CORPUS, "labels", index, rate, streams=2)
    for row, name in enumerate("abcde"):
        assert np.array_equal(store.window(row, slice(None)), two_streams(name, rate))
        frames = frames_of(SAMPLES[name]) // 2
        window = crop_labels(320 * frames, 1, rate)
        assert np.array_equal(store.window(row, window), two_streams(name, rate)[window])


def test_labels_of_another_number_of_streams_are_refused(storage, index):
    write_two_streams(storage, 50)
    with pytest.raises(LabelError, match=r"has \d+ labels; its audio has \d+ frames at 50 Hz. Run"):
        LabelStore(storage, CORPUS, "labels", index, 50)
    with pytest.raises(LabelError, match="frames at 50 Hz and 3 label streams. Run"):
        LabelStore(storage, CORPUS, "labels", index, 50, streams=3)


@pytest.mark.parametrize("at_once", [7, 2**22])
def test_each_stream_has_its_histogram(storage, index, monkeypatch, at_once):
    monkeypatch.setattr(labels_module, "_LABELS_AT_ONCE", at_once)
    write_two_streams(storage, 50)
    store = LabelStore(storage, CORPUS, "labels", index, 50, streams=2)
    expected = [np.bincount(np.concatenate([two_streams(n, 50)[:, s] for n in "bcd"]), minlength=9000) for s in (0, 1)]
    found = store.histograms(slice(1, 4), (9000, 10))
    assert found[0].tolist() == expected[0].tolist()
    assert found[1].tolist() == expected[1][: expected[1].nonzero()[0].max() + 1].tolist()


# --- one file per node ------------------------------------------------------------------------------------------------


@pytest.fixture
def node(tmp_path, monkeypatch) -> Path:
    (tmp_path / "node").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    return tmp_path / "node"


def shared(storage: Storage, index: Index, making: str) -> LabelStore:
    return LabelStore(storage, CORPUS, "labels", index, 50, making=making)


def laid_out(node: Path) -> list[Path]:
    return sorted(node.glob("*/*.u2"))


def test_the_stores_of_a_node_share_one_file(storage, index, node):
    """The second reads no part, and does not wait for the first to end."""
    write(storage, 50, parts_of("edcba", 50))
    first = shared(storage, index, "m")
    for shard in set(SHARDS.values()):
        storage.delete(f"labels/{layout.part(shard)}")
    second = shared(storage, index, "m")
    (file,) = laid_out(node)
    assert file.stat().st_size == 2 * sum(len(labels_of(name, 50)) for name in SAMPLES)
    assert file.parent.stat().st_mode & 0o777 == 0o700
    for row, name in enumerate("abcde"):
        for store in (first, second):
            assert store.window(row, slice(None))[:, 0].tolist() == labels_of(name, 50).tolist()


def test_labels_that_were_made_again_are_laid_out_again(storage, index, node):
    write(storage, 50, parts_of("abcde", 50))
    shared(storage, index, "before")
    again = {s: [(name, labels + 1) for name, labels in rows] for s, rows in parts_of("abcde", 50).items()}
    write(storage, 50, again)
    assert shared(storage, index, "after").window(0, slice(None))[:, 0].tolist() == (labels_of("a", 50) + 1).tolist()


def test_files_that_nobody_reads_make_room_and_those_in_use_stay(storage, index, node):
    write(storage, 50, parts_of("abcde", 50))
    used = shared(storage, index, "used")
    (kept,) = laid_out(node)
    shared(storage, index, "left")  # is gone at once
    assert len(laid_out(node)) == 2
    new = shared(storage, index, "new")
    assert kept in laid_out(node)
    assert len(laid_out(node)) == 2
    assert np.array_equal(used.window(3, slice(None)), new.window(3, slice(None)))


def test_a_store_that_was_cut_short_leaves_no_file_under_its_name(storage, index, node):
    write(storage, 50, parts_of("abd", 50))
    with pytest.raises(LabelError, match="have no labels"):
        shared(storage, index, "m")
    assert not laid_out(node)
    write(storage, 50, parts_of("abcde", 50))
    assert shared(storage, index, "m").window(4, slice(None))[:, 0].tolist() == labels_of("e", 50).tolist()


def test_a_store_by_itself_leaves_nothing(storage, index, node):
    write(storage, 50, parts_of("abcde", 50))
    assert LabelStore(storage, CORPUS, "labels", index, 50).window(4, slice(None))[0, 0] == BASES["e"]
    assert not list(node.iterdir())


# --- crops ------------------------------------------------------------------------------------------------------------


@RATES
def test_a_crops_labels_are_those_of_its_frames(storage, index, rate):
    write(storage, rate, parts_of("abcde", rate))
    store = LabelStore(storage, CORPUS, "labels", index, rate)
    per_frame = rate // 50
    for row, name in enumerate("abcde"):
        total = frames_of(SAMPLES[name])
        for first in {0, 1, total // 2, total - 1} & set(range(total)):
            frames = total - first
            got = store.window(row, crop_labels(320 * first, frames, rate))[:, 0].astype(int) - BASES[name]
            assert got.tolist() == [per_frame * (first + t) for t in range(frames)]


RAMPS_ARE_FINE = Checks(min_seconds=0.025, max_dc_offset=1.0)
RAMP = 2.0**-16  # step of the ramp: exact in float32, below 1 for 65,536 samples


def ramp_corpus(storage: Storage) -> Index:
    """The utterances as float WAVs whose sample values tell their positions: value / RAMP is the index."""
    tables = {}
    for shard in sorted(set(SHARDS.values())):
        raws = []
        for name in (n for n in SAMPLES if SHARDS[n] == shard):
            buffer = io.BytesIO()
            wave = (np.arange(SAMPLES[name]) * RAMP).astype(np.float32)
            soundfile.write(buffer, wave, 16_000, format="WAV", subtype="FLOAT")
            raws.append(RawUtterance(name, "s", "train", "wav", buffer.getvalue()))
        tables[shard] = write_shard(storage, CORPUS, shard, raws, checks=RAMPS_ARE_FINE).manifest
    return write_corpus(storage, CORPUS, tables)


@RATES
def test_waveform_and_labels_are_cut_together(storage, rate):
    index = ramp_corpus(storage)
    write(storage, rate, parts_of("edcba", rate))
    store = LabelStore(storage, CORPUS, "labels", index, rate)
    reader = UtteranceReader(AudioReader(storage, CORPUS), index, normalize=False)
    starts = np.array([0, 320 * 7, 320 * 110, 320 * 23, 0])
    rows = np.array([0, 4, 3, 0, 1])
    crops = reader.crops(MicroBatch(step=0, index=0, rows=rows, starts=starts, frames=15), store)
    assert crops.wave_BS.shape == (5, samples_of(15))
    assert crops.wave_BS.dtype.is_floating_point
    assert crops.labels_BTK.shape == (5, 15, 1)
    ids = ids_of(index, storage)
    for k, (row, start) in enumerate(zip(rows, starts, strict=True)):
        positions = np.round(crops.wave_BS[k].numpy() / RAMP).astype(int)
        assert positions.tolist() == list(range(start, start + samples_of(15)))
        frame_starts = positions[::320][:15]  # the first sample of each frame, as the waveform itself tells it
        label_starts = (crops.labels_BTK[k, :, 0].numpy() - BASES[ids[row]]) * (16_000 // rate)
        assert label_starts.tolist() == frame_starts.tolist()


def test_normalisation_is_over_the_whole_utterance_not_the_crop(storage):
    index = ramp_corpus(storage)
    write(storage, 50, parts_of("abcde", 50))
    store = LabelStore(storage, CORPUS, "labels", index, 50)
    reader = UtteranceReader(AudioReader(storage, CORPUS), index, normalize=True)
    whole = normalise((np.arange(SAMPLES["a"]) * RAMP).astype(np.float32))
    assert np.array_equal(reader.wave(0), whole)
    crops = reader.crops(MicroBatch(0, 0, np.array([0]), np.array([3200]), 20), store)
    assert np.array_equal(crops.wave_BS[0].numpy(), whole[3200 : 3200 + samples_of(20)])


def test_padded_keeps_whole_utterances_and_their_lengths(storage):
    index = ramp_corpus(storage)
    reader = UtteranceReader(AudioReader(storage, CORPUS), index, normalize=False)
    padded = reader.padded([1, 0, 2])
    assert padded.samples_B.tolist() == [5_000, 16_000, 400]
    assert padded.wave_BS.shape == (3, 16_000)
    for k, row in enumerate((1, 0, 2)):
        samples = int(padded.samples_B[k])
        assert np.array_equal(padded.wave_BS[k, :samples].numpy(), reader.wave(row))
        assert not padded.wave_BS[k, samples:].any()
    assert pad([np.ones(3, dtype=np.float32)]).wave_BS.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("at_once", [7, 1000, 2**22])
def test_a_histogram_counts_the_chosen_utterances(storage, index, monkeypatch, at_once):
    monkeypatch.setattr(labels_module, "_LABELS_AT_ONCE", at_once)
    write(storage, 50, parts_of("abcde", 50))
    store = LabelStore(storage, CORPUS, "labels", index, 50)
    expected = np.bincount(np.concatenate([labels_of(name, 50) for name in "bcd"]), minlength=9000)
    assert store.histograms(slice(1, 4), (9000,))[0].tolist() == expected.tolist()
    assert (
        len(store.histograms(slice(1, 4), (10,))[0]) == expected.nonzero()[0].max() + 1
    )  # labels beyond the clusters show
    assert store.histograms(slice(0, 0), (10,))[0].tolist() == [0] * 10
