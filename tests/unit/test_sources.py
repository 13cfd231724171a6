"""What comes out of tars, tables of paths and Parquet when nothing is wrong with them? (For when it is: test_malformed.py.)"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from hubert_ray.config.recipe import AudioTable, Corpus, Parquet, WebDataset
from hubert_ray.data.corpora import open_source, plan_shards
from hubert_ray.data.corpora.source import Group
from hubert_ray.data.corpora.tables import AudioTableSource
from hubert_ray.data.shards import RawUtterance, Rejected
from hubert_ray.errors import CorpusError
from hubert_ray.storage.filesystem import Storage


def recording(seed: int, kind: str = "FLAC") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.random.default_rng(seed).standard_normal(2000), 16_000, format=kind)
    return buffer.getvalue()


def contents(corpus: Corpus) -> list[RawUtterance]:
    source = open_source(corpus)
    found = [
        item
        for groups in plan_shards(source.groups(), source.shard_bytes).values()
        for g in groups
        for item in source.read(g)
    ]
    assert not [item for item in found if isinstance(item, Rejected)]
    return found


# --- WebDataset -------------------------------------------------------------------------------------------------------


def tar(file: Path, members: dict[str, bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as written:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            written.addfile(info, io.BytesIO(data))


def test_tars_are_shards_by_the_split_in_their_path(tmp_path):
    for name in ("b/train-0.tar", "valid_000.tar", "test.tar", "spare-0.tar", "a/train-0.tar", "train.txt"):
        tar(tmp_path / name, {"0.flac": recording(0)})
    source = open_source(WebDataset(name="c", path=str(tmp_path)))
    plan = plan_shards(source.groups(), source.shard_bytes)
    assert {shard: [group.name for group in groups] for shard, groups in plan.items()} == {
        "train-00000": ["a/train-0.tar"],
        "train-00001": ["b/train-0.tar"],
        "train-00002": ["spare-0.tar"],
        "dev-00000": ["valid_000.tar"],
        "test-00000": ["test.tar"],
    }
    alone = open_source(WebDataset(name="c", path=str(tmp_path / "test.tar")))
    assert [group.name for group in alone.groups()] == ["test.tar"]


def test_members_of_a_key_in_any_order_and_the_bytes_they_are(tmp_path):
    tar(
        tmp_path / "train-0.tar",
        {
            "a.json": json.dumps({"text": "from  json", "speaker": 7, "other": [1]}).encode(),
            "a.flac": recording(0),
            "b.wav": recording(1, "WAV"),
            "b.cls": b"7",
            "b.txt": b"from text\n",
            "b.json": json.dumps({"text": "from json", "speaker": "ben"}).encode(),
            "deep/a.v1.flac": recording(2),
        },
    )
    second, third, first = contents(WebDataset(name="c", path=str(tmp_path), test_speakers=("7",)))
    assert (first.utterance_id, first.speaker, first.split, first.text) == ("train-0/a", "7", "test", "from json")
    assert (second.utterance_id, second.speaker, second.split, second.text) == (
        "train-0/b",
        "ben",
        "train",
        "from text",
    )
    assert (third.utterance_id, third.speaker, third.text) == ("train-0/deep/a.v1", "", None)
    data = (tmp_path / "train-0.tar").read_bytes()
    for found in (first, second, third):
        assert data[found.offset : found.offset + len(found.audio)] == found.audio
    assert [found.audio for found in (first, second, third)] == [recording(0), recording(1, "WAV"), recording(2)]


# --- tables of paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_a_group", [1, 2, 3, 7, 500])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_groups_of_a_table_hold_every_row_once(tmp_path, monkeypatch, rows_a_group, suffix):
    """Whatever the group's size, also where a cell has a line break."""
    monkeypatch.setattr(AudioTableSource, "ROWS_A_GROUP", rows_a_group)
    texts = ["ONE", 'SAID "NO"', "A, B", "É" * 50, "", "SIX", "LAST"]
    if suffix == ".csv":
        texts[2] = "A,\nB"
    lines = {".csv": ["text,path"], ".tsv": ["text\tpath"], ".jsonl": []}[suffix]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.flac").write_bytes(recording(number))
        cells = {"text": text, "path": f"{number}.flac"}
        quoted = ",".join('"' + cell.replace('"', '""') + '"' for cell in cells.values())
        lines.append({".csv": quoted, ".tsv": "\t".join(cells.values()), ".jsonl": json.dumps(cells)}[suffix])
    (tmp_path / f"t{suffix}").write_text("\n".join(lines), encoding="utf-8")  # no line break at the end
    corpus = AudioTable(name="c", path=str(tmp_path / f"t{suffix}"))
    assert len(open_source(corpus).groups()) == -(-len(texts) // rows_a_group)
    found = contents(corpus)
    assert [(u.utterance_id, u.text) for u in found] == [
        (str(n), " ".join(t.split()) or None) for n, t in enumerate(texts)
    ]
    assert [u.audio for u in found] == [recording(n) for n in range(len(texts))]


def test_columns_paths_and_splits_of_a_table(tmp_path):
    for number, name in enumerate(("in/a/0.flac", "in/1.WAV", "beside.flac", "in-far/3.flac", "in/4.flac")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(recording(number))
    rows = [
        {"audio_filepath": "a/0.flac", "who": "anna", "split": "validation", "duration": 1.5},
        {"audio_filepath": "./1.WAV", "who": "ben"},
        {"audio_filepath": "../beside.flac", "who": "cleo", "split": "train"},
        {"audio_filepath": str(tmp_path / "in-far" / "3.flac"), "split": "test"},
        {"audio_filepath": str(tmp_path / "in" / "4.flac")},
    ]
    (tmp_path / "in" / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = AudioTable(
        name="c",
        path=str(tmp_path / "in" / "dev.jsonl"),
        path_column="audio_filepath",
        speaker_column="who",
        test_speakers=("cleo",),
    )
    assert [(u.utterance_id, u.speaker, u.split, u.suffix) for u in contents(corpus)] == [
        ("a/0", "anna", "dev", "flac"),
        ("1", "ben", "dev", "wav"),  # the table's own name
        ("4", "", "dev", "flac"),
        ("beside", "cleo", "test", "flac"),
        (f"{tmp_path}/in-far/3".lstrip("/"), "", "test", "flac"),
    ]


def test_rows_of_a_table_fill_shards_by_the_size_of_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(AudioTableSource, "ROWS_A_GROUP", 2)
    (tmp_path / "a.flac").write_bytes(bytes(2**19))
    (tmp_path / "t.csv").write_text("path\n" + "a.flac\n" * 7)
    source = open_source(AudioTable(name="c", path=str(tmp_path / "t.csv"), shard_mib=2))
    plan = plan_shards(source.groups(), source.shard_bytes)
    assert [len(groups) for groups in plan.values()] == [2, 2]


def test_rows_of_several_splits_are_groups_of_each(tmp_path, monkeypatch):
    monkeypatch.setattr(AudioTableSource, "ROWS_A_GROUP", 3)
    lines = ["path,split,speaker"]
    for number, split in enumerate(("train", "dev", "train", "", "test", "")):
        (tmp_path / f"{number}.flac").write_bytes(recording(number))
        lines.append(f"{number}.flac,{split},{'ben' if number == 5 else 'anna'}")
    (tmp_path / "t.csv").write_text("\n".join([*lines, "bad row", ""]))
    source = open_source(AudioTable(name="c", path=str(tmp_path / "t.csv"), dev_speakers=("ben",)))
    found = {}
    for group in source.groups():
        items = list(source.read(group))
        assert items
        assert all(item.split == group.split for item in items if isinstance(item, RawUtterance))
        found[group.split, group.name[:15]] = [getattr(item, "utterance_id", "rejected") for item in items]
    assert sorted(found.values()) == [["0", "2"], ["1"], ["3"], ["4"], ["5"], ["rejected"]]


# --- Parquet ----------------------------------------------------------------------------------------------------------


def test_row_groups_of_parquet_files(tmp_path):
    for name, first in (("data/validation-00000-of-00001.parquet", 0), ("data/train-00000-of-00001.parquet", 5)):
        rows = [
            {
                "audio": {"bytes": recording(n, "WAV" if n % 2 else "FLAC"), "path": f"{n}.mp3" if n == 4 else None},
                "speaker_id": 100 + n,
                "sentence": f"TEXT  {n}" if n % 3 else None,
                "extra": "x" * 1000,
            }
            for n in range(first, first + 5)
        ]
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name, row_group_size=2)
    corpus = Parquet(name="c", path=str(tmp_path), text_column="sentence", test_speakers=("107",))
    groups = open_source(corpus).groups()
    assert [(group.name[5:10], group.name[-1], group.split) for group in groups] == [
        ("train", "0", "train"), ("train", "1", "test"), ("train", "1", "train"), ("train", "2", "train"),
        ("valid", "0", "dev"), ("valid", "1", "dev"), ("valid", "2", "dev"),
    ]  # fmt: skip
    found = sorted(contents(corpus), key=lambda u: u.utterance_id)
    assert [(u.utterance_id, u.speaker, u.split, u.suffix, u.text) for u in found] == [
        ("data/train-00000-of-00001/000000000", "105", "train", "wav", "TEXT 5"),
        ("data/train-00000-of-00001/000000001", "106", "train", "flac", None),
        ("data/train-00000-of-00001/000000002", "107", "test", "wav", "TEXT 7"),
        ("data/train-00000-of-00001/000000003", "108", "train", "flac", "TEXT 8"),
        ("data/train-00000-of-00001/000000004", "109", "train", "wav", None),
        ("data/validation-00000-of-00001/000000000", "100", "dev", "flac", None),
        ("data/validation-00000-of-00001/000000001", "101", "dev", "wav", "TEXT 1"),
        ("data/validation-00000-of-00001/000000002", "102", "dev", "flac", "TEXT 2"),
        ("data/validation-00000-of-00001/000000003", "103", "dev", "wav", None),
        ("data/validation-00000-of-00001/000000004", "104", "dev", "mp3", "TEXT 4"),
    ]
    assert [u.audio for u in found] == [
        recording(n, "WAV" if n % 2 else "FLAC") for n in (5, 6, 7, 8, 9, 0, 1, 2, 3, 4)
    ]


def test_one_named_file_is_that_file_only_and_its_folder_is_not_walked(tmp_path, monkeypatch):
    monkeypatch.setattr(Storage, "walk", lambda *_: pytest.fail("walked"))
    (tmp_path / "test").mkdir()
    for place in ("", "test/"):
        pq.write_table(pa.table({"audio": [recording(0)]}), tmp_path / f"{place}0000.parquet")
        tar(tmp_path / f"{place}0000.tar", {"0.flac": recording(0)})
    named = Parquet(name="c", path=str(tmp_path / "0000.parquet"))
    assert [(group.name, group.split) for group in open_source(named).groups()] == [("0000.parquet#00000", "train")]
    named = WebDataset(name="c", path=str(tmp_path / "0000.tar"))
    assert [(group.name, group.split) for group in open_source(named).groups()] == [("0000.tar", "train")]


@pytest.mark.parametrize(("kind", "suffix"), [(Parquet, "parquet"), (WebDataset, "tar")])
def test_a_file_of_recordings_whose_name_is_not_utf8_is_an_error(tmp_path, kind, suffix):
    (tmp_path / os.fsdecode(b"other\xe9.txt")).write_bytes(b"")
    pq.write_table(pa.table({"audio": [recording(0)]}), tmp_path / "0000.parquet")
    tar(tmp_path / "0000.tar", {"0.flac": recording(0)})
    assert len(open_source(kind(name="c", path=str(tmp_path))).groups()) == 1
    (tmp_path / f"0000.{suffix}").rename(tmp_path / os.fsdecode(b"caf\xe9." + suffix.encode()))
    with pytest.raises(CorpusError, match="is not UTF-8; rename it"):
        open_source(kind(name="c", path=str(tmp_path))).groups()


MEASURED = """
import re, sys
from pathlib import Path
from hubert_ray.config.recipe import Parquet, WebDataset
from hubert_ray.data.corpora import open_source

def peak_kib():  # getrusage would count the memory of the process that this one was forked from
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

source = open_source({"parquet": Parquet, "tar": WebDataset}[sys.argv[1]](name="c", path=sys.argv[2]))
(group,) = source.groups()
before = peak_kib()
audio = sum(len(found.audio) for found in source.read(group))
print(audio, peak_kib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells peak memory on Linux only")
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_row_group_or_tar_is_never_in_memory_as_a_whole(tmp_path, kind):
    """64 MiB of recordings cost a process of its own less than 40."""
    recordings = [bytes([n]) * 2**18 for n in range(256)]
    if kind == "tar":
        tar(tmp_path / "a.tar", {f"{n}.flac": data for n, data in enumerate(recordings)})
    else:
        table = pa.table({"audio": pa.array(recordings, pa.binary())})
        options = {"compression": "none", "use_dictionary": False, "write_batch_size": 1}  # a page for a few rows
        pq.write_table(table, tmp_path / "a.parquet", **options)
    command = [sys.executable, "-c", MEASURED, kind, str(tmp_path)]
    audio, kib = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert audio == 2**26
    assert kib < 40 * 1024


def test_groups_without_a_size_limit_are_shards_of_their_own():
    groups = [Group(name, "train", size) for name, size in (("a", 0), ("b", 0), ("c", 5))]
    assert [len(members) for members in plan_shards(groups, 0).values()] == [1, 1, 1]
