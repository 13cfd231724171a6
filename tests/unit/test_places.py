"""storage/: the same calls give the same answers on a disk, on an S3 API and on one of Google Cloud Storage."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta

import pytest

from hubert_ray.data.shards import AudioReader
from hubert_ray.errors import StorageError
from hubert_ray.storage import filesystem
from hubert_ray.storage.filesystem import Storage
from tests.faults import faulty_s3


@pytest.fixture(params=["disk", "s3", "gs"])
def url(request, tmp_path):
    """Of an empty folder."""
    if request.param == "disk":
        yield str(tmp_path)
    elif request.param == "s3":
        with faulty_s3() as s3:
            yield s3.url(tmp_path.name)  # the server keeps what earlier ones held
    else:
        with google_storage() as found:
            yield found


@contextmanager
def google_storage():
    """An API in a process of its own: in a thread of this one it and pyarrow's client wait for each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ("--host", "127.0.0.1", "--port", str(port), "--in-memory", "--default-bucket", "speech")
    server = subprocess.Popen(
        [sys.executable, "-m", "gcp_storage_emulator", "start", *place], stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        else:
            pytest.fail("the emulator did not start")
        yield f"gs://anonymous@speech/hubert?endpoint_override=127.0.0.1:{port}&scheme=http"
    finally:
        server.terminate()
        server.wait()


def test_files_and_folders(url):
    storage = Storage(url)
    assert (list(storage.walk()), storage.list("a"), storage.exists("a")) == ([("", {})], [], False)
    with pytest.raises(FileNotFoundError):
        storage.read("a/one.bin")
    for name, data in {
        "a/one.bin": b"12345",
        "a/deep/two.bin": b"22",
        "b/c/d/three.bin": b"",
        "four.bin": b"4",
    }.items():
        storage.write(name, data)
    assert storage.read("a/one.bin") == b"12345"
    assert storage.read("b/c/d/three.bin") == b""
    assert (storage.size("a/one.bin"), storage.size("nothing")) == (5, 0)
    with storage.open("a/one.bin") as file:
        assert file.read_at(3, 1) == b"234"
    assert storage.list("a") == ["one.bin"]
    assert storage.list("", recursive=True) == ["a/deep/two.bin", "a/one.bin", "b/c/d/three.bin", "four.bin"]
    assert storage.scan("") == ({"four.bin": 1}, ("a", "b"))
    assert storage.scan("b/c") == ({}, ("d",))
    assert list(storage.walk("a")) == [("a", {"one.bin": 5}), ("a/deep", {"two.bin": 2})]
    assert [folder for folder, _ in storage.walk()] == ["", "a", "a/deep", "b", "b/c", "b/c/d"]
    assert (storage.is_folder("a"), storage.is_folder("four.bin"), storage.is_folder("e")) == (True, False, False)
    before = storage.version("four.bin")
    time.sleep(1.1)  # S3 tells the time to the second
    storage.write("four.bin", b"5")
    assert (storage.read("four.bin"), storage.version("four.bin") != before) == (b"5", True)
    storage.delete("a")
    storage.delete("a")  # absent: fine
    storage.delete("four.bin")
    assert storage.list("", recursive=True) == ["b/c/d/three.bin"]


def test_a_failed_write_leaves_what_was_there(url):
    storage = Storage(url)
    storage.write("file", b"old")
    with pytest.raises(RuntimeError, match="disk on fire"), storage.create("file") as stream:
        stream.write(b"ne")
        raise RuntimeError("disk on fire")
    assert storage.read("file") == b"old"


def test_a_place_is_a_folder_or_a_file_in_one(url):
    Storage(url).write("a/table.csv", b"1")
    path, mark, options = url.partition("?")
    storage, name = Storage.of(f"{path}/a/table.csv{mark}{options}")
    assert (storage.read(name), name) == (b"1", "table.csv")
    storage, name = Storage.of(f"{path}/a{mark}{options}")
    assert (storage.list(""), name) == (["table.csv"], "")
    with pytest.raises(StorageError, match="is a file, not a folder"):
        Storage(f"{path}/a/table.csv{mark}{options}")
    with pytest.raises(StorageError, match="no such folder or file"):
        Storage.of(f"{path}/b{mark}{options}")


def test_a_google_store_that_is_away_is_named_soon(monkeypatch):
    monkeypatch.setattr(filesystem, "PATIENCE", timedelta(seconds=1))
    with pytest.raises(StorageError, match=r"gs://.*can be reached"):
        Storage("gs://anonymous@speech/hubert?endpoint_override=127.0.0.1:9&scheme=http")


def test_few_files_of_google_stay_open(url):
    """Each has a download of its whole object under way."""
    storage = Storage(url)
    for number in range(40):
        storage.write(f"c/audio/s{number}.tar", b"12345")
    reader = AudioReader(storage, "c")
    for number in range(40):
        assert reader.read(f"s{number}", 1, 3) == b"234"
    opened = len(reader._few.shards) + len(reader._many.shards)
    assert opened == (40 if url.startswith("s3") else 32)
