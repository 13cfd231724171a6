"""Does a shard give back exactly the bytes that went in, at the manifest's offsets, and name what it refused?"""

from __future__ import annotations

import io
import tarfile

import msgspec
import numpy as np
import pyarrow.compute as pc
import pytest
import soundfile

from hubert_ray.data import audio
from hubert_ray.data.shards import AudioReader, Locations, Manifest, RawUtterance, Rejected, write_shard
from hubert_ray.errors import CorpusError
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage

CORPUS = "corpora/c"
LONG = "speaker-" + "x" * 180  # more than the 100 bytes of a tar header's name field


def flac(seed: int, samples: int = 2000, kind: str = "FLAC") -> bytes:
    buffer = io.BytesIO()
    wave = 0.1 * np.random.default_rng(seed).standard_normal(samples)
    soundfile.write(buffer, wave, 16_000, format=kind, subtype="PCM_16")
    return buffer.getvalue()


def utterance(name: str, seed: int, **fields) -> RawUtterance:
    return RawUtterance(name, "s1", "train", "flac", flac(seed, 2000 + 137 * seed), **fields)


UTTERANCES = [
    utterance("a", 0, text="HELLO", phones=[(0, 800, "HH"), (800, 2000, "AH")]),
    utterance(LONG, 1),
    RawUtterance("b", "s2", "dev", "wav", flac(2, 2048 - 22, "WAV"), text="GRÜN"),  # 4096 bytes: no padding in the tar
    utterance("c", 3, text=""),
]


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path))


def tar_bytes(storage: Storage, shard: str = "train-00000") -> bytes:
    return storage.read(f"{CORPUS}/audio/{shard}.tar")


def test_manifest_offsets_are_the_original_bytes(storage):
    tables = write_shard(storage, CORPUS, "train-00000", UTTERANCES)
    assert tables.manifest.schema == schemas.MANIFEST
    assert tables.quarantine.num_rows == 0
    reader, data = AudioReader(storage, CORPUS), tar_bytes(storage)
    rows = tables.manifest.to_pylist()
    assert [row["utterance_id"] for row in rows] == [u.utterance_id for u in UTTERANCES]
    for row, source in zip(rows, UTTERANCES, strict=True):
        assert reader.read(row["shard"], row["offset"], row["size"]) == source.audio
        assert data[row["offset"] : row["offset"] + row["size"]] == source.audio
        assert np.array_equal(reader.wave(row["shard"], row["offset"], row["size"]), audio.decode(source.audio))


def test_tar_is_what_webdataset_reads(storage):
    write_shard(storage, CORPUS, "train-00000", UTTERANCES)
    with tarfile.open(fileobj=io.BytesIO(tar_bytes(storage))) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    assert list(members) == ["a.flac", "a.txt", f"{LONG}.flac", "b.wav", "b.txt", "c.flac", "c.txt"]
    assert members["a.txt"] == b"HELLO"
    assert members["b.txt"] == "GRÜN".encode()
    assert members["c.txt"] == b""
    assert members["b.wav"] == UTTERANCES[2].audio
    assert len(members["b.wav"]) % tarfile.BLOCKSIZE == 0  # the case it was made for


def test_manifest_row_holds_all_that_is_known(storage):
    first, second, third, _ = write_shard(storage, CORPUS, "train-00000", UTTERANCES).manifest.to_pylist()
    assert first["speaker"] == "s1"
    assert (first["samples"], first["sample_rate_hz"], first["size"]) == (2000, 16_000, len(UTTERANCES[0].audio))
    assert first["phones"] == [{"start": 0, "end": 800, "phone": "HH"}, {"start": 800, "end": 2000, "phone": "AH"}]
    assert (second["text"], second["phones"]) == (None, None)
    assert (third["split"], third["text"], third["samples"]) == ("dev", "GRÜN", 2026)


def test_samples_are_those_of_the_decoded_wave_at_16_khz(storage):
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.random.default_rng(0).standard_normal(1501), 8_000, format="FLAC")
    raw = RawUtterance("slow", "s", "train", "flac", buffer.getvalue())
    (row,) = write_shard(storage, CORPUS, "train-00000", [raw]).manifest.to_pylist()
    assert (row["samples"], row["sample_rate_hz"]) == (3002, 8_000)
    assert len(AudioReader(storage, CORPUS).wave("train-00000", row["offset"], row["size"])) == 3002


def test_the_same_input_gives_the_same_bytes(storage, monkeypatch):
    write_shard(storage, CORPUS, "train-00000", UTTERANCES)
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("os.getuid", lambda: 4321)
    write_shard(storage, CORPUS, "train-00001", UTTERANCES)
    assert tar_bytes(storage) == tar_bytes(storage, "train-00001")


def test_quarantine_names_what_was_refused_and_why(storage):
    good = utterance("good", 0)
    tables = write_shard(
        storage,
        CORPUS,
        "train-00000",
        [
            RawUtterance("void", "s1", "train", "flac", b""),
            good,
            Rejected("x.trans.txt", "bad_transcript", "not UTF-8"),
            RawUtterance("cut", "s1", "train", "flac", flac(1)[:500], text="LOST"),
            utterance("good", 5),  # another recording under a name that is taken
            RawUtterance("brief", "s1", "train", "flac", flac(1, 399)),
            utterance("last", 1),
        ],
    )
    assert tables.quarantine.schema == schemas.QUARANTINE
    rows = [(row["source"], row["reason"]) for row in tables.quarantine.to_pylist()]
    assert rows == [
        ("void", "empty"),
        ("x.trans.txt", "bad_transcript"),
        ("cut", "undecodable"),
        ("good", "duplicate_id"),
        ("brief", "too_short"),
    ]
    assert tables.quarantine["detail"][1].as_py() == "not UTF-8"
    assert all(tables.quarantine["detail"].to_pylist())
    assert tables.manifest["utterance_id"].to_pylist() == ["good", "last"]
    row = tables.manifest.to_pylist()[0]
    assert AudioReader(storage, CORPUS).read("train-00000", row["offset"], row["size"]) == good.audio
    with tarfile.open(fileobj=io.BytesIO(tar_bytes(storage))) as tar:
        assert tar.getnames() == ["good.flac", "last.flac"]  # nothing of the refused, not even their text


def test_an_id_that_was_refused_may_come_again_sound(storage):
    broken = RawUtterance("a", "s1", "train", "flac", b"rubbish")
    tables = write_shard(storage, CORPUS, "train-00000", [broken, utterance("a", 0)])
    assert tables.manifest["utterance_id"].to_pylist() == ["a"]
    assert tables.quarantine["reason"].to_pylist() == ["undecodable"]


def test_a_shard_of_nothing_usable_is_an_empty_tar_and_empty_tables(storage):
    tables = write_shard(storage, CORPUS, "train-00000", [Rejected("a", "empty", "0 bytes")])
    assert tables.manifest.num_rows == 0
    assert tables.manifest.schema == schemas.MANIFEST
    with tarfile.open(fileobj=io.BytesIO(tar_bytes(storage))) as tar:
        assert tar.getnames() == []


def test_a_source_that_fails_leaves_no_shard(storage):
    def source():
        yield utterance("a", 0)
        raise OSError("disk went away")

    with pytest.raises(OSError, match="disk went away"):
        write_shard(storage, CORPUS, "train-00000", source())
    assert storage.list(CORPUS, recursive=True) == []


def test_reading_past_a_truncated_shard_is_an_error(storage):
    rows = write_shard(storage, CORPUS, "train-00000", UTTERANCES).manifest.to_pylist()
    cut = rows[2]["offset"] + 100
    storage.write(f"{CORPUS}/audio/train-00000.tar", tar_bytes(storage)[:cut])
    reader = AudioReader(storage, CORPUS)
    assert reader.read("train-00000", rows[0]["offset"], rows[0]["size"]) == UTTERANCES[0].audio
    for row in rows[2:]:
        with pytest.raises(
            CorpusError, match=r"shard 'train-00000' ends at byte .* up to byte .*run prepare_data again"
        ):
            reader.read("train-00000", row["offset"], row["size"])


def test_audio_that_was_damaged_later_is_named(storage):
    row = write_shard(storage, CORPUS, "train-00000", UTTERANCES).manifest.to_pylist()[0]
    data, path = bytearray(tar_bytes(storage)), f"{CORPUS}/audio/train-00000.tar"
    data[row["offset"] : row["offset"] + row["size"]] = bytes(row["size"])
    storage.write(path, bytes(data))
    with pytest.raises(CorpusError, match=rf"shard 'train-00000', bytes {row['offset']} to .*altered or damaged"):
        AudioReader(storage, CORPUS).wave("train-00000", row["offset"], row["size"])


def test_reader_keeps_few_shards_open_and_reopens_them(storage):
    shards = {f"train-{n:05d}": utterance(f"u{n}", n) for n in range(4)}
    rows = {shard: write_shard(storage, CORPUS, shard, [raw]).manifest.to_pylist()[0] for shard, raw in shards.items()}
    opened: list[str] = []

    class Counting(Storage):
        def open(self, path):
            opened.append(path[-5])
            return super().open(path)

    reader = AudioReader(Counting(storage.url), CORPUS, keep_open=2)
    for n in (0, 1, 0, 2, 0, 1, 3, 3):  # 1 falls out for 2, 2 for 1, 0 for 3
        shard = f"train-{n:05d}"
        assert reader.read(shard, rows[shard]["offset"], rows[shard]["size"]) == shards[shard].audio
    assert opened == list("01213")


@pytest.mark.parametrize("tars_are_local", [True, False])
def test_as_many_shards_stay_open_as_the_place_of_the_tars_allows(storage, monkeypatch, tars_are_local):
    """Tars elsewhere than their corpus, one of both on an object store; each place is looked at once."""
    opened, made = [], []

    class Remote(Storage):
        is_local, opens_cheaply = False, True

    class Local(Storage):
        is_local, opens_cheaply = True, False

    class Elsewhere(Local if tars_are_local else Remote):
        def __init__(self, url, cache=None):
            made.append(url)
            super().__init__(url, cache)

        def open(self, path):
            opened.append(path)
            return super().open(path)

    shards, tars = [f"train-{n:05d}" for n in range(40)], {}
    row = write_shard(storage, "elsewhere", "all", UTTERANCES).manifest.to_pylist()[0]
    data = storage.read(f"elsewhere/{layout.audio_shard('all')}")
    for shard in shards:
        storage.write(f"elsewhere/{shard}.tar", data)
        tars[shard] = (storage.full("elsewhere"), f"{shard}.tar")
    storage.write(f"{CORPUS}/{layout.LOCATIONS}", msgspec.json.encode(Locations(tars)))
    corpus = (Remote if tars_are_local else Local)(storage.url)
    monkeypatch.setattr("hubert_ray.data.shards.Storage", Elsewhere)
    reader = AudioReader(corpus, CORPUS)
    for shard in [*shards, *shards]:
        assert reader.read(shard, row["offset"], row["size"]) == UTTERANCES[0].audio
    assert len(opened) == (
        80 if tars_are_local else 40
    )  # 32 of a disk stay open, so that none is left when its turn comes
    assert made == [storage.full("elsewhere")]


def test_manifest_selects(storage):
    table = write_shard(storage, CORPUS, "train-00000", UTTERANCES).manifest
    for shard, rows in {"train-00000": table, "train-00001": table.slice(1, 2)}.items():
        storage.write(f"{CORPUS}/{layout.manifest_part(shard)}", schemas.encode(rows))
    both = Manifest.read(storage, CORPUS, ["train-00001", "train-00000"], where=pc.field("text").is_valid())
    assert both.table["utterance_id"].to_pylist() == ["b", "a", "b", "c"]
    assert len(Manifest.read(storage, CORPUS, [])) == 0
    manifest = Manifest.read_shard(storage, CORPUS, "train-00000")
    assert len(manifest) == 4
    assert manifest.shard_of(3) == "train-00000"
    assert manifest.split("dev").table["utterance_id"].to_pylist() == ["b"]
    assert manifest.transcribed().table["utterance_id"].to_pylist() == ["a", "b", "c"]
    assert manifest.numbers("samples").tolist() == [2000, 2137, 2026, 2411]
    assert manifest.shards() == ["train-00000"]
    assert Manifest.read(storage, CORPUS, ["train-00000"], ["speaker"]).table.column_names == ["speaker"]
