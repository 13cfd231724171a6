"""What becomes of each kind of broken input? A table: what is put in, and the reason why not, or the length it is let in with.

All cases of a source are read in one run of it, each between sound neighbours, which must come through. What makes a whole
corpus unusable is an error, in a table of its own at the end.
"""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from hubert_ray.config.recipe import AudioFolder, AudioTable, Checks, Corpus, LibriSpeech, Parquet, WebDataset
from hubert_ray.data import audio
from hubert_ray.data.corpora import open_source, plan_shards
from hubert_ray.data.shards import ShardTables, index_shard, write_shard
from hubert_ray.errors import CorpusError, StorageError
from hubert_ray.storage.filesystem import Storage

SECOND = 16_000
FEW_ROWS = 3  # at a time, so that every case of a table meets the borders of groups


def noise(seed: int, samples: int = SECOND) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def encoded(wave: np.ndarray, rate: int = SECOND, kind: str = "FLAC", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def patched(data: bytes, at: int, form: str, *values: int) -> bytes:
    copy = bytearray(data)
    struct.pack_into(form, copy, at, *values)
    return bytes(copy)


def read(corpus: Corpus, out: Path) -> list[ShardTables]:
    """What prepare_data's workers make of a corpus, shard by shard."""
    source = open_source(corpus)
    tables = []
    for shard, groups in plan_shards(source.groups(), source.shard_bytes).items():
        utterances = (item for group in groups for item in source.read(group))
        if source.shard_bytes:
            tables.append(write_shard(Storage(str(out)), "c", shard, utterances, checks=corpus.checks))
        else:
            tables.append(index_shard(shard, utterances, checks=corpus.checks))
    return tables


def outcome(tables: list[ShardTables]) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Samples by id, and reasons by source; a source such as `a.tar: 'x.flac'` counts under the name in quotes too."""
    samples, reasons = {}, {}
    for table in tables:
        for row in table.manifest.to_pylist():
            assert row["utterance_id"] not in samples
            samples[row["utterance_id"]] = row["samples"]
        for row in table.quarantine.to_pylist():
            assert row["detail"]
            reasons.setdefault(row["source"], []).append(row["reason"])
    return samples, reasons


# --- audio: what the bytes of a file may be ---------------------------------------------------------------------------

SOUND = noise(0)
FLAC = encoded(SOUND)
WAV = encoded(noise(1), kind="WAV", subtype="PCM_16")  # 44 bytes of header, 32,000 of samples
FLOAT = encoded(noise(2), kind="WAV", subtype="FLOAT")
VORBIS = encoded(noise(3), kind="OGG", subtype="VORBIS")
OPUS = encoded(noise(4), kind="OGG", subtype="OPUS")
MP3 = encoded(noise(5), kind="MP3", subtype="MPEG_LAYER_III")


def spoilt(value: float) -> bytes:
    wave = noise(6)
    wave[77] = value
    return encoded(wave, kind="WAV", subtype="FLOAT")


def overwritten(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(200) + data[middle + 200 :]


# file -> its bytes, and a reason or the samples at 16 kHz
AUDIO: dict[str, tuple[bytes, str | int]] = {
    # nothing or something else
    "zero-bytes.flac": (b"", "empty"),
    "one-byte.wav": (b"R", "undecodable"),
    "garbage.flac": (np.random.default_rng(0).bytes(5000), "undecodable"),
    "zeros.wav": (bytes(4000), "undecodable"),
    "ones.mp3": (b"\xff" * 4000, "undecodable"),
    "page.flac": (b"<html>404 not found</html>" * 40, "undecodable"),
    "text.wav": (b"one two three\n" * 100, "undecodable"),
    "gzipped.flac": (gzip.compress(FLAC), "undecodable"),
    "m4a.mp3": (b"\0\0\0\x20ftypM4A " + bytes(500), "undecodable"),
    "mp3-headers-only.mp3": (b"\xff\xfb\x90\x00" * 2000, "undecodable"),
    # FLAC, cut and overwritten
    "flac-3-bytes.flac": (FLAC[:3], "undecodable"),
    "flac-cut-in-header.flac": (FLAC[:20], "undecodable"),
    "flac-header-only.flac": (FLAC[:42], "undecodable"),
    "flac-cut-in-first-frame.flac": (FLAC[:100], "undecodable"),
    "flac-cut-in-half.flac": (FLAC[: len(FLAC) // 2], "undecodable"),
    "flac-last-byte-gone.flac": (FLAC[:-1], "undecodable"),
    "flac-overwritten.flac": (overwritten(FLAC), "undecodable"),
    "flac-no-magic.flac": (b"FLAC" + FLAC[4:], "undecodable"),
    "flac-no-length.flac": (patched(FLAC, 21, ">BI", FLAC[21] & 0xF0, 0), "undecodable"),
    "flac-says-10-hours.flac": (patched(FLAC, 22, ">I", 36_000 * SECOND), "too_long"),
    "flac-says-one-more.flac": (patched(FLAC, 22, ">I", SECOND + 1), "undecodable"),
    "flac-after-id3.flac": (b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + encoded(noise(10)), SECOND),
    "flac-then-junk.flac": (encoded(noise(11)) + b"junk" * 100, SECOND),
    # WAV and its header
    "wav-cut-in-half.wav": (WAV[: len(WAV) // 2], "undecodable"),
    "wav-last-byte-gone.wav": (WAV[:-1], "undecodable"),
    "wav-header-only.wav": (WAV[:44], "undecodable"),
    "wav-cut-in-header.wav": (WAV[:30], "undecodable"),
    "wav-no-data.wav": (WAV[:36], "undecodable"),
    "wav-says-longer.wav": (patched(WAV, 40, "<I", 64_000), "undecodable"),
    "wav-says-shorter.wav": (patched(encoded(noise(12), kind="WAV"), 40, "<I", 16_000), 8000),
    "wav-says-nothing.wav": (patched(WAV, 40, "<I", 0), "too_short"),
    "wav-from-a-pipe.wav": (patched(encoded(noise(13), kind="WAV"), 40, "<I", 2**32 - 1), SECOND),
    "wav-no-channel.wav": (patched(WAV, 22, "<H", 0), "undecodable"),
    "wav-65535-channels.wav": (patched(WAV, 22, "<H", 2**16 - 1), "undecodable"),
    "wav-no-bits.wav": (patched(WAV, 34, "<H", 0), "undecodable"),
    "wav-unknown-codec.wav": (patched(WAV, 20, "<H", 0x7777), "undecodable"),
    "wav-rate-0.wav": (patched(WAV, 24, "<I", 0), "undecodable"),
    "wav-rate-2-to-31.wav": (patched(WAV, 24, "<I", 2**31), "undecodable"),
    # kinds of samples
    "nan.wav": (spoilt(np.nan), "not_finite"),
    "inf.wav": (spoilt(np.inf), "not_finite"),
    "minus-inf.wav": (spoilt(-np.inf), "not_finite"),
    "8-bit.wav": (encoded(noise(14), kind="WAV", subtype="PCM_U8"), SECOND),
    "24-bit.wav": (encoded(noise(15), kind="WAV", subtype="PCM_24"), SECOND),
    "32-bit.wav": (encoded(noise(16), kind="WAV", subtype="PCM_32"), SECOND),
    "24-bit.flac": (encoded(noise(17), subtype="PCM_24"), SECOND),
    "float64.wav": (encoded(noise(18), kind="WAV", subtype="DOUBLE"), SECOND),
    "u-law.wav": (encoded(noise(19), kind="WAV", subtype="ULAW"), SECOND),
    "a-law.wav": (encoded(noise(20), kind="WAV", subtype="ALAW"), SECOND),
    "ms-adpcm.wav": (encoded(noise(21), kind="WAV", subtype="MS_ADPCM"), 16_192),  # whole blocks
    "rf64.wav": (encoded(noise(22), kind="RF64"), SECOND),
    "aiff.wav": (encoded(noise(23), kind="AIFF"), SECOND),  # the bytes tell, not the name
    "flac.mp3": (encoded(noise(24)), SECOND),
    # lossy formats
    "mp3.mp3": (MP3, SECOND),
    "mp3-cut.mp3": (MP3[: len(MP3) // 2], "undecodable"),
    "vorbis.ogg": (VORBIS, SECOND),
    "vorbis-cut.ogg": (VORBIS[: len(VORBIS) // 2], "undecodable"),
    "vorbis-last-page-gone.ogg": (VORBIS[: VORBIS.rindex(b"OggS")], "undecodable"),
    "vorbis-cut-in-last-header.ogg": (VORBIS[: VORBIS.rindex(b"OggS") + 5], "undecodable"),
    "vorbis-last-byte-gone.ogg": (VORBIS[:-1], "undecodable"),
    "vorbis-overwritten.ogg": (overwritten(VORBIS), "undecodable"),
    "opus.opus": (OPUS, SECOND),
    "opus-cut.opus": (OPUS[: len(OPUS) // 2], "undecodable"),
    "opus-overwritten.opus": (overwritten(OPUS), "undecodable"),
    # rates and channels
    "8-khz.wav": (encoded(noise(30, 8000), 8000, "WAV"), SECOND),
    "11025-hz.wav": (encoded(noise(31, 11_025), 11_025, "WAV"), SECOND),
    "44100-hz.flac": (encoded(noise(32, 44_100), 44_100), SECOND),
    "1-hz.wav": (encoded(noise(33, 100), 1, "WAV"), "sample_rate"),
    "7999-hz.wav": (encoded(noise(33), 7999, "WAV"), "sample_rate"),
    "44101-hz.wav": (encoded(noise(33), 44_101, "WAV"), "sample_rate"),  # a filter of gigabytes
    "6-channels.wav": (encoded(np.stack([noise(34 + n) for n in range(6)], 1), kind="WAV"), SECOND),
    "8-channels.flac": (encoded(np.stack([noise(40 + n) for n in range(8)], 1)), SECOND),
    # length
    "no-samples.wav": (encoded(SOUND[:0], kind="WAV"), "too_short"),
    "24-ms.wav": (encoded(SOUND[:384], kind="WAV"), "too_short"),
    "just-below-100-ms.wav": (encoded(SOUND[:1599], kind="WAV"), "too_short"),
    "100-ms.wav": (encoded(noise(50, 1600), kind="WAV"), 1600),
    "120-s.wav": (encoded(noise(51, 960_000), 8000, "WAV", "PCM_U8"), 120 * SECOND),
    "just-above-120-s.wav": (encoded(noise(51, 960_001), 8000, "WAV", "PCM_U8"), "too_long"),
    "10-hours.wav": (encoded(np.zeros(3_600_000), 100, "WAV", "PCM_U8"), "too_long"),
    # level
    "digital-silence.flac": (encoded(np.zeros(SECOND)), "silent"),
    "constant.flac": (encoded(np.full(SECOND, 0.05)), "silent"),
    "one-bit-of-noise.flac": (encoded(np.random.default_rng(0).integers(0, 2, SECOND).astype(np.int16)), "silent"),
    "channels-that-cancel.wav": (encoded(np.stack([SOUND, -SOUND], 1), kind="WAV"), "silent"),
    "dc-offset.flac": (encoded(SOUND / 2 + 0.6), "dc_offset"),
    "clipped.flac": (encoded(np.clip(40 * SOUND, -1, 1)), "clipped"),
    "float-of-16-bit-range.wav": (encoded(2**15 * SOUND, kind="WAV", subtype="FLOAT"), "clipped"),
    # the same again
    "twin.flac": (FLAC, "duplicate_content"),
    "twin.wav": (encoded(soundfile.read(io.BytesIO(FLAC), dtype="int16")[0], kind="WAV"), "duplicate_content"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Every case as a file of one folder, and a sound recording at either end."""
    root, out = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("out")
    (root / "anna").mkdir()
    for number, (name, (data, _)) in enumerate(AUDIO.items()):
        file = root / "anna" / f"{number:03d}-{name}"
        file.write_bytes(data)
    (root / "anna" / "---first.flac").write_bytes(FLAC)
    (root / "anna" / "zzz-last.flac").write_bytes(encoded(noise(99)))
    samples, reasons = outcome(read(AudioFolder(name="c", path=str(root)), out))
    assert samples["anna/---first"] == samples["anna/zzz-last"] == SECOND
    assert len(samples) + sum(map(len, reasons.values())) == len(AUDIO) + 2
    return samples, reasons


@pytest.mark.parametrize("number", range(len(AUDIO)), ids=list(AUDIO))
def test_audio(files, number):
    samples, reasons = files
    name, (_, expected) = list(AUDIO.items())[number]
    utterance_id = f"anna/{number:03d}-{name.rpartition('.')[0]}"
    found = samples.get(utterance_id) or reasons[utterance_id]
    assert found == (expected if isinstance(expected, int) else [expected])


def test_what_is_let_in_can_be_read_back():
    for name, (data, expected) in AUDIO.items():
        if isinstance(expected, int):
            assert len(audio.decode(data)) == expected, name


# --- names and transcripts of files -----------------------------------------------------------------------------------


def folder_of_names(root: Path) -> None:
    folder = root / "train" / "anna"
    folder.mkdir(parents=True)
    for number, name in enumerate(("good.flac", "new\nline.flac", "same.flac", "same.wav", "café.flac")):
        (folder / name).write_bytes(encoded(noise(number), kind="WAV" if name.endswith("wav") else "FLAC"))
    (folder / os.fsdecode(b"caf\xe9.flac")).write_bytes(encoded(noise(10)))
    (folder / "folder.flac").mkdir()
    (folder / "good.txt").write_bytes("\ufeffHELLO\r\n  WORLD\r\n".encode())
    (folder / "café.txt").write_bytes(b"CAF\xc9")
    (folder / "lone.txt").write_text("SPOKEN BY NOBODY")
    (folder / ".hidden.flac").write_bytes(FLAC)
    (folder / "loop").symlink_to(root)


def test_names_and_transcripts_of_a_folder(tmp_path):
    try:
        folder_of_names(tmp_path / "in")
    except OSError:
        pytest.skip("this file system refuses such names")
    tables = read(AudioFolder(name="c", path=str(tmp_path / "in")), tmp_path / "out")
    samples, reasons = outcome(tables)
    assert set(samples) == {f"train/anna/{name}" for name in ("good", "same", "café")}
    assert reasons == {
        "train/anna/new\nline": ["bad_name"],
        "train/anna/same": ["duplicate_id"],
        "train/anna/café": ["bad_transcript"],
        repr(os.fsdecode(b"caf\xe9.flac")): ["bad_name"],
        "train/anna/lone": ["no_audio"],
    }
    texts = dict(zip(*(tables[0].manifest[column].to_pylist() for column in ("utterance_id", "text")), strict=True))
    assert texts == {"train/anna/good": "HELLO WORLD", "train/anna/same": None, "train/anna/café": None}


def test_a_folder_whose_name_is_not_utf8_is_an_error(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    except OSError:
        pytest.skip("this file system refuses such names")
    with pytest.raises(StorageError, match="not UTF-8; rename it"):
        read(AudioFolder(name="c", path=str(tmp_path)), tmp_path / "out")


def test_transcripts_can_be_required(tmp_path):
    folder = tmp_path / "in" / "train-a" / "1" / "2"
    folder.mkdir(parents=True)
    for number in range(4):
        (folder / f"1-2-{number:04d}.flac").write_bytes(encoded(noise(number)))
    (folder / "1-2.trans.txt").write_text("1-2-0000 ZERO\n1-2-0001 \n\n1-2-0003 THREE\n1-2-0009 NINE\n")
    for required, expected in ((False, []), (True, ["1-2-0001", "1-2-0002"])):
        checks = Checks(require_text=required)
        samples, reasons = outcome(
            read(LibriSpeech(name="c", path=str(tmp_path / "in"), checks=checks), tmp_path / "out")
        )
        assert len(samples) == 4 - len(expected)
        assert reasons == {"1-2-0009": ["no_audio"]} | {name: ["no_text"] for name in expected}


# --- Libri-light ------------------------------------------------------------------------------------------------------

# JSON beside a recording -> the speaker that comes out, and the reasons
LIBRI_LIGHT: dict[str, tuple[bytes | None, str, list[str]]] = {
    "whole": (b'{"speaker": "2156", "book_meta": {"genre": ["Plays"]}, "snr": 9.1}', "2156", []),
    "number": (b'{"speaker": 2157}', "2157", []),
    "silent about it": (b'{"snr": 9.1}', "100", []),
    "null": (b'{"speaker": null}', "100", []),
    "absent": (None, "100", []),
    "empty": (b"", "100", ["bad_metadata"]),
    "cut": (b'{"speaker": "21', "100", ["bad_metadata"]),
    "a list": (b"[1]", "100", ["bad_metadata"]),
    "not UTF-8": (b'{"speaker": "\xff"}', "100", ["bad_metadata"]),
}


def test_libri_light(tmp_path):
    folder = tmp_path / "in" / "small" / "100" / "book_librivox_64kb_mp3"
    folder.mkdir(parents=True)
    for number, (name, (metadata, _, _)) in enumerate(LIBRI_LIGHT.items()):
        (folder / f"{name}.flac").write_bytes(encoded(noise(number)))
        if metadata is not None:
            (folder / f"{name}.json").write_bytes(metadata)
    tables = read(LibriSpeech(name="c", path=str(tmp_path / "in")), tmp_path / "out")
    _, reasons = outcome(tables)
    rows = {row["utterance_id"]: row for row in tables[0].manifest.to_pylist()}
    for name, (_, speaker, expected) in LIBRI_LIGHT.items():
        row = rows[f"100/book_librivox_64kb_mp3/{name}"]
        assert (row["speaker"], row["split"]) == (speaker, "train"), name
        assert reasons.get(f"{name}.json", []) == expected, name


# --- tars -------------------------------------------------------------------------------------------------------------


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def tar_of(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


LONG = "speaker-" + "x" * 180
RECORDINGS = iter(range(100, 200))


def flac_member(name: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, encoded(noise(next(RECORDINGS), 2000)))


# case -> members put between `first.flac` and `last.flac`, ids let in besides those two, reasons set aside for
MEMBERS: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], list[str], list[str]]] = {
    "nothing": ([], [], []),
    "up-and-out": ([flac_member("../up.flac")], [], ["bad_name"]),
    "up-in-the-middle": ([flac_member("a/../../up.flac")], [], ["bad_name"]),
    "absolute": ([flac_member("/etc/passwd.flac")], [], ["bad_name"]),
    "dot-slash": ([flac_member("./here.flac")], ["here"], []),
    "folders": ([member("a", kind=tarfile.DIRTYPE), flac_member("a/b.flac")], ["a/b"], []),
    "not-utf8": ([flac_member(os.fsdecode(b"caf\xe9.flac"))], [], ["bad_name"]),
    "long-name": ([flac_member(f"{LONG}.flac")], [LONG], []),
    "symbolic-link": ([member("link.flac", kind=tarfile.SYMTYPE, link="/etc/passwd")], [], ["not_a_file"]),
    "hard-link": ([member("link.flac", kind=tarfile.LNKTYPE, link="first.flac")], [], ["not_a_file"]),
    "pipe": ([member("pipe.wav", kind=tarfile.FIFOTYPE)], [], ["not_a_file"]),
    "device": ([member("device.wav", kind=tarfile.CHRTYPE)], [], ["not_a_file"]),
    "zero-bytes": ([member("void.flac")], [], ["empty"]),
    "broken-audio": ([member("cut.flac", FLAC[:999])], [], ["undecodable"]),
    "text-only": ([member("text.txt", b"WORDS")], [], ["no_audio"]),
    "json-only": ([member("text.json", b'{"text": "WORDS"}')], [], ["no_audio"]),
    "text-not-utf8": ([flac_member("a.flac"), member("a.txt", b"CAF\xc9")], ["a"], ["bad_transcript"]),
    "json-cut": ([flac_member("a.flac"), member("a.json", b'{"text": "W')], ["a"], ["bad_metadata"]),
    "json-list": ([flac_member("a.flac"), member("a.json", b"[1]")], ["a"], ["bad_metadata"]),
    "json-text-a-number": ([flac_member("a.flac"), member("a.json", b'{"text": 1}')], ["a"], ["bad_metadata"]),
    "two-recordings": ([flac_member("a.flac"), flac_member("a.wav")], ["a"], ["duplicate_id"]),
    "key-again": ([flac_member("a.flac"), flac_member("b.flac"), flac_member("a.flac")], ["a", "b"], ["duplicate_id"]),
    "audio-again": ([member("a.flac", FLAC), member("b.flac", FLAC)], ["a"], ["duplicate_content"]),
    "unknown-suffix": ([member("a.cls", b"7"), member("README", b"")], [], []),
    "upper-case": ([flac_member("A.FLAC")], ["A"], []),
}

_ALL = tar_of(flac_member("first.flac"), flac_member("middle.flac"), flac_member("last.flac"))
_SECOND_HEADER = _ALL.index(b"middle.flac")
_THIRD_HEADER = _ALL.index(b"last.flac")

# case -> a whole tar, ids let in, reasons set aside for
TARS: dict[str, tuple[bytes, list[str], list[str]]] = {
    "no-bytes": (b"", [], ["bad_tar"]),
    "no-members": (tar_of(), [], []),
    "garbage": (np.random.default_rng(0).bytes(5000), [], ["bad_tar"]),
    "cut-in-audio": (_ALL[: _THIRD_HEADER + 1000], ["first", "middle"], ["bad_tar"]),
    "cut-in-header": (_ALL[: _THIRD_HEADER + 100], ["first", "middle"], ["bad_tar"]),
    "cut-between-members": (_ALL[:_THIRD_HEADER], ["first", "middle"], ["bad_tar"]),
    "broken-header": (
        _ALL[: _SECOND_HEADER + 100] + b"\xff" * 100 + _ALL[_SECOND_HEADER + 200 :],
        ["first"],
        ["bad_tar"],
    ),
    "pax": (tar_of(flac_member(f"{LONG}é.flac"), form=tarfile.PAX_FORMAT), [f"{LONG}é"], []),
}


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> tuple[dict[str, int], dict[str, list[str]]]:
    root = tmp_path_factory.mktemp("tars")
    for name, (members, _, _) in MEMBERS.items():
        (root / f"{name}.tar").write_bytes(tar_of(flac_member("first.flac"), *members, flac_member("last.flac")))
    for name, (data, _, _) in TARS.items():
        (root / f"{name}.tar").write_bytes(data)
    before = {file.name: file.read_bytes() for file in root.iterdir()}
    found = outcome(read(WebDataset(name="c", path=str(root)), root))
    assert {file.name: file.read_bytes() for file in root.iterdir()} == before
    return found


@pytest.mark.parametrize("name", [*MEMBERS, *TARS])
def test_tars(tars, name):
    samples, reasons = tars
    if name in MEMBERS:
        _, ids, expected = MEMBERS[name]
        ids = ["first", *ids, "last"]
    else:
        _, ids, expected = TARS[name]
    assert sorted(i for i in samples if i.startswith(f"{name}/")) == sorted(f"{name}/{i}" for i in ids)
    mine = [
        reason
        for source, found in reasons.items()
        for reason in found
        if source.strip("'").startswith((f"{name}/", f"{name}.tar"))
    ]
    assert mine == expected


# --- tables of paths --------------------------------------------------------------------------------------------------

HEADER = ("path", "id", "speaker", "split", "text")
# case -> a row as it stands in a .csv file, and a reason or the id that is let in
CSV_ROWS: dict[str, tuple[bytes, str | None, str | None]] = {
    "all": (b"a/0.flac,zero,anna,train,HELLO", None, "zero"),
    "only a path": (b"a/1.flac,,,,", None, "a/1"),
    "quoted": (b'"a/2.flac","two, too",,,"SAID ""NO"""', None, "two, too"),
    "line in a cell": (b'a/3.flac,three,,,"ONE\nTWO"', None, "three"),
    "empty line": (b"", None, None),
    "few cells": (b"a/4.flac,four", "bad_row", None),
    "many cells": (b"a/4.flac,four,,,,,", "bad_row", None),
    "no path": (b",five,,,", "bad_row", None),
    "unknown split": (b"a/4.flac,six,,spare,", "bad_row", None),
    "validation": (b"a/4.flac,seven,,validation,", None, "seven"),
    "not UTF-8": (b"a/5.flac,eight,,,CAF\xc9", "bad_row", None),
    "no such file": (b"a/none.flac,nine,,,", "no_audio", None),
    "a folder": (b"a,ten,,,", "unreadable", None),
    "a file as folder": (b"a/5.flac/x.flac,eleven,,,", "unreadable", None),
    "name too long": (b"x" * 300 + b".flac,twelve,,,", "unreadable", None),
    "a URL": (b"https://host/x.flac,thirteen,,,", "bad_name", None),
    "id upwards": (b"a/5.flac,../up,,,", "bad_name", None),
    "path upwards": (b"../beside.flac,,,,", None, "beside"),
    "broken audio": (b"a/broken.flac,fourteen,,,", "undecodable", None),
    "id again": (b"a/5.flac,zero,,,", "duplicate_id", None),
    "audio again": (b"a/0.flac,fifteen,,,", "duplicate_content", None),
    "NUL": (b"a/\x00.flac,sixteen,,,", "bad_name", None),
    "a cell without end": (b'a/6.flac,seventeen,,,"' + b"x" * 200_000 + b'"', "bad_row", None),
}

JSONL_ROWS: dict[str, tuple[bytes, str | None, str | None]] = {
    "all": (b'{"path": "a/0.flac", "id": "zero", "speaker": 7, "text": "HELLO"}', None, "zero"),
    "only a path": (b'{"path": "a/1.flac"}', None, "a/1"),
    "numbers": (b'{"path": "a/2.flac", "id": 2, "speaker": 3.0, "text": 12}', None, "2"),
    "nulls": (b'{"path": "a/3.flac", "id": null, "speaker": null}', None, "a/3"),
    "cut": (b'{"path": "a/4.fl', "bad_row", None),
    "a list": (b"[1, 2]", "bad_row", None),
    "no path": (b'{"id": "five"}', "bad_row", None),
    "null path": (b'{"path": null, "id": "six"}', "bad_row", None),
    "not UTF-8": (b'{"path": "a/4.flac", "text": "CAF\xc9"}', "bad_row", None),
    "lone surrogate": (b'{"path": "a/4.flac", "id": "\\ud800"}', "bad_row", None),
    "two objects": (b'{"path": "a/4.flac"} {"path": "a/5.flac"}', "bad_row", None),
    "empty line": (b"   ", None, None),
    "no such file": (b'{"path": "a/none.flac", "id": "seven"}', "no_audio", None),
}


@pytest.mark.parametrize(
    ("suffix", "head", "rows"),
    [
        (".csv", ",".join(HEADER).encode(), CSV_ROWS),
        (".jsonl", b"", JSONL_ROWS),
    ],
    ids=["csv", "jsonl"],
)
def test_tables_of_paths(tmp_path, monkeypatch, suffix, head, rows):
    """Each row by itself between sound ones in one table, whose lines end in both ways, and the whole after a byte order mark."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    for number in range(8):
        (tmp_path / "in" / "a" / f"{number}.flac").write_bytes(encoded(noise(number)))
    (tmp_path / "in" / "a" / "broken.flac").write_bytes(FLAC[:999])
    (tmp_path / "beside.flac").write_bytes(encoded(noise(20)))
    lines = [head] if head else []
    for row, _, _ in rows.values():
        lines.append(row)
    table = tmp_path / "in" / f"table{suffix}"
    table.write_bytes(b"\xef\xbb\xbf" + b"".join(line + (b"\n", b"\r\n")[k % 2] for k, line in enumerate(lines)))
    monkeypatch.setattr("hubert_ray.data.corpora.tables.AudioTableSource.ROWS_A_GROUP", FEW_ROWS)
    tables = read(AudioTable(name="c", path=str(table)), tmp_path / "out")
    found = pa.concat_tables(part.quarantine for part in tables)["reason"].to_pylist()
    assert found == [reason for _, reason, _ in rows.values() if reason]
    samples, _ = outcome(tables)
    assert sorted(samples) == sorted(name for _, _, name in rows.values() if name)


def test_quotes_mean_nothing_in_a_tsv(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.flac").write_bytes(encoded(noise(number)))
    table = tmp_path / "validated.tsv"
    table.write_text('path\tsentence\n0.flac\t"Who is there?\n1.flac\tHe said "no\n2.flac\tplain\n')
    tables = read(AudioTable(name="c", path=str(table), text_column="sentence"), tmp_path / "out")
    assert tables[0].manifest["text"].to_pylist() == ['"Who is there?', 'He said "no', "plain"]


# --- Parquet ----------------------------------------------------------------------------------------------------------

HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet(rows: list[dict], kind: pa.DataType = HUGGING_FACE, **columns: pa.DataType) -> bytes:
    buffer = io.BytesIO()
    schema = pa.schema([("audio", kind), *columns.items()])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, row_group_size=FEW_ROWS, compression="none")
    return buffer.getvalue()


def hf(number: int, **more) -> dict:
    return {"audio": {"bytes": encoded(noise(number)), "path": f"{number}.flac"}} | more


def misspelt(data: bytes) -> bytes:
    """A string of the file that is UTF-8 no more."""
    assert data.count(b"MISSPELT") >= 1
    return data.replace(b"MISSPELT", b"MISSPEL\xff")


def with_broken_page(data: bytes) -> bytes:
    """The header of the second row group's first page overwritten."""
    column = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    return data[:start] + b"\xff" * 20 + data[start + 20 :]


# file -> its bytes, the rows let in, and reasons set aside for
PARQUETS: dict[str, tuple[bytes, list[int], list[str]]] = {
    "whole": (parquet([hf(n) for n in range(7)]), list(range(7)), []),
    "plain-binary": (parquet([{"audio": encoded(noise(10, 2000))}], pa.binary()), [0], []),
    "large-binary": (parquet([{"audio": encoded(noise(11, 2000))}], pa.large_binary()), [0], []),
    "null-bytes": (parquet([hf(20), {"audio": {"bytes": None, "path": "x.flac"}}, hf(21)]), [0, 2], ["no_audio"]),
    "null-struct": (parquet([hf(22), {"audio": None}, hf(23)]), [0, 2], ["no_audio"]),
    "null-plain": (parquet([{"audio": None}, {"audio": encoded(noise(24))}], pa.binary()), [1], ["no_audio"]),
    "empty-bytes": (parquet([{"audio": {"bytes": b"", "path": None}}, hf(25)]), [1], ["empty"]),
    "broken-audio": (parquet([{"audio": {"bytes": FLAC[:999], "path": None}}, hf(26)]), [1], ["undecodable"]),
    "no-rows": (parquet([]), [], []),
    "no-parquet": (b"rubbish" * 100, [], ["bad_table"]),
    "cut": (parquet([hf(n) for n in range(3)])[:-100], [], ["bad_table"]),
    "broken-page": (with_broken_page(parquet([hf(n) for n in range(30, 39)])), [0, 1, 2, 6, 7, 8], ["bad_table"]),
    "text-not-utf8": (misspelt(parquet([hf(40, text="MISSPELT")], text=pa.string())), [0], ["bad_transcript"]),
    "id-again": (parquet([hf(n, id="id-again/000000000") for n in (41, 42)], id=pa.string()), [0], ["duplicate_id"]),
    "audio-again": (parquet([hf(43), hf(43)]), [0], ["duplicate_content"]),
}


@pytest.fixture(scope="module")
def parquets(tmp_path_factory) -> tuple[dict[str, int], dict[str, list[str]]]:
    root, out = tmp_path_factory.mktemp("parquets"), tmp_path_factory.mktemp("out")
    for name, (data, _, _) in PARQUETS.items():
        (root / f"{name}.parquet").write_bytes(data)
    return outcome(read(Parquet(name="c", path=str(root), checks=Checks()), out))


@pytest.mark.parametrize("name", PARQUETS)
def test_parquet(parquets, name):
    samples, reasons = parquets
    _, rows, expected = PARQUETS[name]
    assert [i for i in samples if i.startswith(f"{name}/")] == [f"{name}/{row:09d}" for row in rows]
    mine = [r for source, found in reasons.items() for r in found if source.startswith((f"{name}/", f"{name}.parquet"))]
    assert mine == expected


# --- what makes a whole corpus unusable -------------------------------------------------------------------------------


def write(name: str, data: bytes) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        (root / name).write_bytes(data)
        return str(root)

    return make


def table(name: str, data: bytes) -> Callable[[Path], str]:
    return lambda root: f"{write(name, data)(root)}/{name}"


# case -> kind of corpus, what to write, other settings, words of the error
UNUSABLE = {
    "nowhere": (AudioFolder, lambda root: str(root / "nowhere"), {}, "no such folder"),
    "tar.gz": (WebDataset, write("a.tar.gz", gzip.compress(tar_of())), {}, "'a.tar.gz' is compressed"),
    "gzipped tar": (WebDataset, write("a.tar", gzip.compress(tar_of())), {}, r"'a.tar' is compressed \(gzip\)"),
    "no tars": (WebDataset, write("a.flac", FLAC), {}, "holds no .tar files"),
    "no parquet": (Parquet, write("a.flac", FLAC), {}, "no .parquet file that has rows"),
    "parquet without rows": (Parquet, write("a.parquet", parquet([])), {}, "no .parquet file that has rows"),
    "another column": (Parquet, write("a.parquet", parquet([hf(0)])), {"audio_column": "speech"}, "no column speech; it has audio"),
    "text column missing": (Parquet, write("a.parquet", parquet([hf(0)])), {"text_column": "words"}, "no column words"),
    "column of text": (Parquet, write("a.parquet", parquet([{"audio": "x"}], pa.string())), {}, "is string; expected binary"),
    "struct of others": (Parquet, write("a.parquet", parquet([], pa.struct([("x", pa.int8())]))), {}, "struct<x: int8>; expected"),
    "other suffix": (AudioTable, table("a.txt", b"path\n1.flac\n"), {}, "no .csv, .tsv or .jsonl"),
    "a folder as table": (AudioTable, write("a.csv", b""), {}, "no .csv, .tsv or .jsonl"),
    "empty table": (AudioTable, table("a.csv", b""), {}, "no column path"),
    "no table": (AudioTable, table("a.csv", b"x" * 200_000), {}, "does not begin with a line of column names"),
    "header only": (AudioTable, table("a.csv", b"path,text\n"), {}, "has no rows"),
    "no rows": (AudioTable, table("a.jsonl", b"\n\n"), {}, "has no rows"),
    "no column of paths": (AudioTable, table("a.csv", b"file,text\n1.flac,A\n"), {}, "no column path; it has file, text"),
    "a named column missing": (AudioTable, table("a.tsv", b"path\n1.flac\n"), {"text_column": "sentence"}, "no column sentence"),
    "an unknown speaker": (AudioTable, table("a.csv", b"path,speaker\n1.flac,anna\n"), {"dev_speakers": ("ben",)}, "name ben"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable(tmp_path, case):
    kind, make, settings, words = UNUSABLE[case]
    (tmp_path / "in").mkdir()
    with pytest.raises(CorpusError, match=words):
        read(kind(name="c", path=make(tmp_path / "in"), **settings), tmp_path / "out")


def test_there_are_sixty_at_least():
    assert len(AUDIO) + len(MEMBERS) + len(TARS) + len(CSV_ROWS) + len(JSONL_ROWS) + len(PARQUETS) + len(UNUSABLE) >= 60
