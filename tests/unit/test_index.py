"""data/index.py: the numbers of all utterances, in the order of the parts, as they are in the parts; and what is refused."""

from __future__ import annotations

import io
import os
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_ray.data import index as index_module
from hubert_ray.data.index import COLUMNS, Index, repeated
from hubert_ray.data.shards import WHOLE
from hubert_ray.errors import CorpusError
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage
from tests.corpora import write_corpus

PATH = "corpora/c"


def table_of(shard: str, names: str, split: str = "train", **columns) -> pa.Table:
    """One utterance per letter, with numbers that tell it apart."""
    rows = [
        {
            "utterance_id": name, "speaker": f"s{ord(name) % 3}", "split": split, "shard": shard, "offset": 512 + ord(name) * 2**31,
            "size": 1000 + ord(name), "samples": 20_000 + ord(name), "sample_rate_hz": 16_000, **WHOLE,
            "text": "A" if name in "ab" else None, "phones": [] if name == "c" else None,
        }
        for name in names
    ]  # fmt: skip
    return pa.Table.from_pylist([row | columns for row in rows], schema=schemas.MANIFEST)


def tables_of(**shards: str) -> dict[str, pa.Table]:
    """`train_00000="abc"`: the shard of these utterances."""
    named = {shard.replace("_", "-"): names for shard, names in shards.items()}
    return {shard: table_of(shard, names, shard.split("-")[-2]) for shard, names in named.items()}


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path))


def ids(index: Index, storage: Storage) -> str:
    return "".join(index.id_of(storage, PATH, row) for row in range(len(index)))


def test_rows_are_the_parts_rows_in_order(storage):
    tables = tables_of(train_00001="abc", train_00000="de", dev_00000="fgh", test_00000="i")
    index = write_corpus(storage, PATH, tables)
    whole = pa.concat_tables(tables.values())
    for column, kind in COLUMNS.items():
        assert index.numbers(column).dtype == np.dtype(kind)
        assert index.numbers(column).tolist() == whole[column].to_pylist()
    assert [index.shard_of(row) for row in range(len(index))] == whole["shard"].to_pylist()
    assert ids(index, storage) == "abcdefghi"
    assert index.rows_of("dev") == slice(5, 8)
    assert [(shard.name, rows) for shard, rows in index.by_shard()][1:3] == [
        ("train-00000", slice(3, 5)), ("dev-00000", slice(5, 8)),
    ]  # fmt: skip


def test_a_split_is_an_index_by_itself(storage):
    index = write_corpus(storage, PATH, tables_of(train_00000="abc", train_00001="de", dev_00000="fgh"))
    dev = index.split("dev")
    assert (len(dev), ids(dev, storage)) == (3, "fgh")
    assert dev.numbers("size").tolist() == [1000 + ord(name) for name in "fgh"]
    assert dev.shard_of(2) == "dev-00000"
    assert len(index.split("test")) == 0
    assert index.split("test").by_part() == {}


def test_the_parts_of_a_mix_are_ranges_of_rows(storage):
    tables = tables_of(
        x_train_00000="ab", x_train_00001="c", y_train_00000="d", x_dev_00000="e", y_dev_00000="fg",
    )  # fmt: skip
    index = write_corpus(storage, PATH, tables)
    assert index.split("train").by_part() == {"x": slice(0, 3), "y": slice(3, 4)}
    assert index.split("dev").by_part() == {"x": slice(0, 1), "y": slice(1, 3)}
    assert write_corpus(storage, PATH, tables_of(train_00000="ab", train_00001="c")).by_part() == {"": slice(0, 3)}


def test_what_the_parts_add_up_to(storage):
    tables = tables_of(train_00000="abcd", dev_00000="be", test_00000="f")
    tables["dev-00000"] = table_of("dev-00000", "ef", "dev", speaker="", sample_rate_hz=8000)
    tables["test-00000"] = table_of("test-00000", "gh", "test")
    contents = write_corpus(storage, PATH, tables).contents
    assert [(shard.name, shard.utterances, shard.transcribed, shard.aligned) for shard in contents.shards] == [
        ("train-00000", 4, 2, 1), ("dev-00000", 2, 0, 0), ("test-00000", 2, 0, 0),
    ]  # fmt: skip
    assert contents.speakers == {"train": 3, "dev": 0, "test": 2}  # "" is nobody
    assert contents.shared_speakers == ("s1", "s2")
    assert contents.low_rate == 2
    again = write_corpus(storage, PATH, tables).contents
    assert again == contents
    tables["test-00000"] = table_of("test-00000", "gh", "test", size=7)
    assert write_corpus(storage, PATH, tables).contents.digest != contents.digest


def test_the_digest_is_of_what_the_parts_hold_not_of_their_files(storage, monkeypatch):
    """Another writer, or another layout of the same rows, is the same speech; another value or null is not."""
    table = table_of("train-00000", "abc")
    phones = [[{"start": 0, "end": 5, "phone": "AA"}, {"start": 5, "end": 9, "phone": "B"}], [], None]
    table = table.set_column(
        12, schemas.MANIFEST.field("phones"), pa.array(phones, schemas.MANIFEST.field("phones").type)
    )

    def digest(table: pa.Table) -> str:
        return write_corpus(storage, PATH, {"train-00000": table}).contents.digest

    def changed(column: str, values: list) -> pa.Table:
        field = schemas.MANIFEST.field(column)
        return table.set_column(schemas.MANIFEST.get_field_index(column), field, pa.array(values, field.type))

    before = digest(table)
    others = [
        changed("text", ["A", None, "A"]), changed("text", ["A", "A", ""]), changed("speaker", ["s1s", "2", "s0"]),
        changed("size", [1097, 1098, 1]), changed("digest", [b"0" * 16, None, None]), changed("speech_share", [0.5, None, None]),
        changed("phones", [phones[0][:1], phones[0][1:], None]), changed("phones", [phones[0], None, None]),
        changed("phones", [[phones[0][0] | {"phone": "AAB"}, phones[0][1] | {"phone": ""}], [], None]),
    ]  # fmt: skip
    assert len({before, *map(digest, others)}) == 1 + len(others)

    def otherwise(table: pa.Table) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="none", row_group_size=1, use_dictionary=False, store_schema=False)
        return buffer.getvalue()

    monkeypatch.setattr(schemas, "encode", otherwise)
    assert digest(table) == before


def test_speakers_are_counted_over_many_parts(storage, monkeypatch):
    monkeypatch.setattr(index_module, "_SETTLED_AT_LEAST", 2)
    tables = {
        f"train-{number:05d}": table_of(f"train-{number:05d}", chr(97 + number), speaker=f"s{number % 4}")
        for number in range(12)
    }
    assert write_corpus(storage, PATH, tables).contents.speakers == {"train": 4}


def test_empty_shards_leave_no_trace(storage):
    index = write_corpus(storage, PATH, tables_of(train_00000="", train_00001="ab", dev_00000=""))
    assert [shard.name for shard in index.shards] == ["train-00001"]
    nothing = write_corpus(storage, PATH, tables_of(train_00000=""))
    assert (len(nothing), len(nothing.split("train"))) == (0, 0)


def test_shards_that_lie_apart_or_hold_two_splits_are_refused(storage):
    for order in (
        tables_of(train_00000="a", dev_00000="b", train_00001="c"),
        tables_of(x_train_00000="a", y_train_00000="b", x_train_00001="c"),
    ):
        with pytest.raises(CorpusError, match="lies apart"):
            write_corpus(storage, PATH, order)
    with pytest.raises(CorpusError, match="of the train split, but has utterances of dev"):
        write_corpus(storage, PATH, {"train-00000": table_of("train-00000", "a", "dev")})


def test_a_number_that_its_column_cannot_hold_is_refused(storage):
    with pytest.raises(CorpusError, match="shard train-00000: size: .*4294967296.* cut that recording"):
        write_corpus(storage, PATH, {"train-00000": table_of("train-00000", "a", size=2**32)})


@pytest.mark.parametrize("spoil", ["missing", "short", "uneven", "no shards"])
def test_an_index_that_is_not_whole_is_refused(storage, spoil):
    write_corpus(storage, PATH, tables_of(train_00000="abc"))
    column = f"{PATH}/{layout.INDEX_FOLDER}/size.u4"
    if spoil == "missing":
        storage.delete(column)
    elif spoil == "no shards":
        storage.delete(f"{PATH}/{layout.INDEX}")
    else:
        storage.write(column, storage.read(column)[: 8 if spoil == "short" else 9])
    with pytest.raises(CorpusError, match="run prepare_data again"):
        Index.open(storage, PATH)


@given(keys=st.lists(st.integers(-5, 5) | st.integers(-(2**63), 2**63 - 1), max_size=50), at_once=st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_repeated_keys_are_found_however_many_turns_it_takes(keys, at_once):
    array = np.array(keys, dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_AT_ONCE", at_once)
        found = repeated(lambda rows: array[rows], len(array))
    assert found.tolist() == [row for row, key in enumerate(keys) if keys.count(key) > 1]


def test_an_object_store_is_copied_once_per_node(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    local = write_corpus(storage, PATH, tables_of(train_00000="abc", dev_00000="d"))
    opened = []

    class Remote(Storage):
        is_local = False

        def open(self, path):
            opened.append(path)
            return super().open(path)

    remote = [Index.open(Remote(storage.url), PATH) for _ in range(3)]
    for column in COLUMNS:
        assert remote[2].numbers(column).tolist() == local.numbers(column).tolist()
    assert len(opened) == len(COLUMNS)
    (copy,) = (tmp_path / "node").iterdir()
    assert copy.stat().st_mode & 0o777 == 0o700
    os.remove(copy / "size.u4")  # a copy that was cut short is not there under its name
    (copy / "size.u4.part").write_bytes(b"12")
    assert Index.open(Remote(storage.url), PATH).numbers("size").tolist() == local.numbers("size").tolist()
    other = write_corpus(storage, PATH, tables_of(train_00000="xyz"))  # the same place, other speech
    assert Index.open(Remote(storage.url), PATH).numbers("size").tolist() == other.numbers("size").tolist()


def test_nothing_is_read_before_it_is_asked_for(storage):
    """Columns are mapped: what lies behind them changes with the file."""
    index = write_corpus(storage, PATH, tables_of(train_00000="abc"))
    with open(storage.full(f"{PATH}/{layout.INDEX_FOLDER}/size.u4"), "r+b") as file:
        file.write(np.array([5], "<u4").tobytes())
    assert int(index.numbers("size")[0]) == 5
