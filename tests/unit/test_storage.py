"""storage/: whole-or-absent writes, and when an artifact may be trusted."""

from __future__ import annotations

import pickle

import pytest

from hubert_ray.errors import StaleArtifactError, StorageError, UnsealedArtifactError
from hubert_ray.storage import layout
from hubert_ray.storage.artifacts import Artifact, identity_of
from hubert_ray.storage.filesystem import Storage


def artifact(storage, **settings):
    return Artifact(storage, "runs/r/stage", identity_of("stage", {"steps": 5} | settings, {"corpus": "abc"}))


def test_a_place_where_nothing_can_be_made_is_named():
    with pytest.raises(StorageError, match="/proc/nowhere"):
        Storage("/proc/nowhere").write("a/b", b"1")


def test_write_read_list_delete(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write("a/b/one.bin", b"1")
    storage.write("a/b/two.bin", b"22")
    assert storage.read("a/b/two.bin") == b"22"
    assert storage.list("a", recursive=True) == ["b/one.bin", "b/two.bin"]
    assert storage.list("nowhere") == []
    storage.delete("a/b")
    storage.delete("a/b")  # absent: fine
    assert not storage.exists("a/b/one.bin")


def test_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write("file", b"old")
    with pytest.raises(RuntimeError, match="disk on fire"), storage.create("file") as stream:
        stream.write(b"ne")
        raise RuntimeError("disk on fire")
    assert storage.read("file") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_half_written_file_is_not_listed(tmp_path):
    storage = Storage(str(tmp_path))
    with storage.create("folder/file") as stream:
        stream.write(b"half")
        assert storage.list("folder") == []
        assert not storage.exists("folder/file")
    assert storage.list("folder") == ["file"]


def test_a_walk_sees_every_folder_once_whatever_links_there_are(tmp_path):
    for name in ("b/two.bin", "a/one.bin", "a/deep/three.bin"):
        Storage(str(tmp_path)).write(name, b"12345"[: len(name) % 5])
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "c").symlink_to(tmp_path / "b")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert list(Storage(str(tmp_path)).walk()) == [
        ("", {}),
        ("a", {"one.bin": 4}),
        ("a/deep", {"three.bin": 1}),
        ("b", {"two.bin": 4}),
        ("c", {"two.bin": 4}),
    ]
    assert Storage(str(tmp_path)).scan("a") == ({"one.bin": 4}, ("deep", "loop"))
    assert Storage(str(tmp_path)).scan("nowhere") == ({}, ())


def test_a_place_is_a_folder_or_a_file_in_one(tmp_path, monkeypatch):
    Storage(str(tmp_path)).write("a/table.csv", b"1")
    monkeypatch.chdir(tmp_path)
    for place in ("a/table.csv", str(tmp_path / "a" / "table.csv"), (tmp_path / "a" / "table.csv").as_uri()):
        storage, name = Storage.of(place)
        assert (storage.read(name), name) == (b"1", "table.csv")
    storage, name = Storage.of("a")
    assert (storage.root, name) == (str(tmp_path / "a"), "")
    with pytest.raises(StorageError, match="no such folder or file"):
        Storage.of("b")
    with pytest.raises(StorageError, match="is a file"):
        Storage("a/table.csv")


def test_storage_pickles_to_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packed = pickle.dumps(Storage("here"))
    monkeypatch.chdir("/")
    assert pickle.loads(packed).root == str(tmp_path / "here")


def test_seal_is_needed_and_found(tmp_path):
    made = artifact(Storage(str(tmp_path)))
    with pytest.raises(UnsealedArtifactError, match="runs/r/stage"):
        made.require()
    made.claim()
    assert made.seal_or_none() is None
    made.seal({"rows": 3})
    assert made.require().facts == {"rows": 3}


@pytest.mark.parametrize("sealed", [True, False])
def test_other_settings_are_stale_and_named(tmp_path, sealed):
    storage = Storage(str(tmp_path))
    made = artifact(storage)
    made.claim()
    if sealed:
        made.seal({})
    with pytest.raises(StaleArtifactError) as caught:
        artifact(storage, steps=7).seal_or_none()
    message = str(caught.value)
    assert "steps: 5 on storage, 7 in the recipe" in message
    assert ("made" if sealed else "begun") in message
    assert "hubert-ray remove runs/r/stage" in message


def test_other_inputs_are_stale(tmp_path):
    storage = Storage(str(tmp_path))
    artifact(storage).seal({})
    other = Artifact(storage, "runs/r/stage", identity_of("stage", {"steps": 5}, {"corpus": "xyz"}))
    with pytest.raises(StaleArtifactError, match="inputs.corpus"):
        other.seal_or_none()


def test_fingerprint_depends_on_every_part_and_not_on_key_order():
    one = identity_of("s", {"a": 1, "b": {"c": 2}}, {"x": "1"})
    assert one.fingerprint == identity_of("s", {"b": {"c": 2}, "a": 1}, {"x": "1"}).fingerprint
    for other in (
        identity_of("t", {"a": 1, "b": {"c": 2}}, {"x": "1"}),
        identity_of("s", {"a": 1, "b": {"c": 3}}, {"x": "1"}),
        identity_of("s", {"a": 1, "b": {"c": 2}}, {"x": "2"}),
    ):
        assert other.fingerprint != one.fingerprint


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://x/y", "Unrecognized filesystem"),
        ("s3://", "bucket"),
        ("s3://b/x?foo=1", "not a folder"),
    ],
)
def test_places_that_are_none(url, message):
    with pytest.raises(StorageError, match=message):
        Storage(url)


def test_a_file_is_no_place(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="is a file, not a folder"):
        Storage(str(tmp_path / "file"))


def test_files_that_change_after_the_seal_are_told(tmp_path):
    made = artifact(Storage(str(tmp_path)))
    made.claim()
    for name, data in {"a.npy": b"1", "b.json": b"2", "c.json": b"3", "parts/d": b"4", layout.LOCATIONS: b"5"}.items():
        made.storage.write(made.file(name), data)
    made.seal({})
    assert (made.altered(), made.read_sealed("a.npy")) == ([], b"1")
    made.storage.write(made.file("a.npy"), b"9")
    made.storage.write(made.file(layout.LOCATIONS), b"9")  # where tars are, which users may change
    made.storage.delete(made.file("b.json"))
    assert made.altered() == ["a.npy", "b.json"]
    with pytest.raises(
        StorageError, match="a.npy is not the file that was sealed; make it again after hubert-ray remove"
    ):
        made.read_sealed("a.npy")


def test_a_damaged_seal_is_named(tmp_path):
    made = artifact(Storage(str(tmp_path)))
    made.storage.write(made.file(layout.SEAL), b'{"identity": ')
    with pytest.raises(StorageError, match="_SUCCESS cannot be read"):
        made.seal_or_none()
    made.seal({})
    seal = made.read(layout.SEAL)
    made.storage.write(made.file(layout.SEAL), seal.replace(made.identity.fingerprint.encode(), b"0" * 16))
    with pytest.raises(StorageError, match="fingerprint 0000000000000000 is not that of the identity beside it"):
        made.seal_or_none()


def test_checkpoint_names_sort_by_step():
    assert layout.checkpoint(900) < layout.checkpoint(1000)
