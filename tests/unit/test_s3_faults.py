"""storage/ against a real S3 API that fails: a read gives every byte or raises, a write is whole or absent and says which."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest

from hubert_ray.config.recipe import Mfcc
from hubert_ray.data.shards import write_shard
from hubert_ray.stages.assign_labels import Labeller
from hubert_ray.stages.context import TeacherAt
from hubert_ray.storage import filesystem, layout, schemas
from hubert_ray.storage.filesystem import Storage
from hubert_ray.units.kmeans import Codebook
from tests.faults import faulty_s3
from tests.unit.test_shards import CORPUS, utterance

DATA = np.random.default_rng(0).bytes(300_000)
FAULTS = ["500", "503", "cut", "truncated", "slow"]


@pytest.fixture(scope="module")
def s3():
    with faulty_s3() as server:
        yield server


@pytest.fixture
def impatient(s3, monkeypatch):
    """A storage that tries twice: what ten tries cannot mend fails the same way, a minute later."""
    monkeypatch.setattr(filesystem, "ATTEMPTS", 1)
    return Storage(s3.url())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_read_gets_over_faults(s3, fault):
    storage = Storage(s3.url())
    storage.write("a", DATA)
    with s3.faults(fault, fault, fault):
        assert storage.read("a") == DATA
    assert [met for method, _, met in s3.log if met] == [fault] * (1 if fault == "slow" else 3)
    with s3.faults(fault, fault, fault), storage.open("a") as file:
        assert file.read_at(100_000, 150_000) == DATA[150_000:250_000]


@pytest.mark.parametrize("fault", ["500", "cut", "truncated"])
def test_a_read_never_returns_short(s3, impatient, fault):
    Storage(s3.url()).write("a", DATA)
    with s3.faults(*[fault] * 20), pytest.raises(OSError, match="GetObject"):
        impatient.read("a")
    with s3.faults(*[fault] * 20), impatient.open("a") as file, pytest.raises(OSError, match="GetObject"):
        file.read_at(100_000, 0)
    assert impatient.read("a") == DATA


@pytest.mark.slow
def test_ten_tries_and_the_waits_between_outlast_a_restart(s3):
    """Eight failures in a row take 6 s; pyarrow's own patience ends at 6."""
    storage = Storage(s3.url())
    storage.write("a", DATA)
    with s3.faults(*["503"] * 8):
        assert pickle.loads(pickle.dumps(storage)).read("a") == DATA


@pytest.mark.parametrize("fault", ["500", "503", "cut", "lost"])
@pytest.mark.parametrize("size", [0, 300_000, pytest.param(12_000_000, marks=pytest.mark.slow)])  # in several parts
def test_a_write_gets_over_faults(s3, fault, size):
    storage, data = Storage(s3.url()), (DATA * 40)[:size]
    storage.write("w", b"old")
    with s3.faults(fault, fault, fault, on=("PUT",)):
        storage.write("w", data)
    assert [met for _, _, met in s3.log if met] == [fault] * 3
    assert storage.read("w") == data


@pytest.mark.parametrize("where", ["uploads", "partNumber", "uploadId"])  # begins, uploads a part, completes
def test_a_write_that_fails_for_good_says_so_and_leaves_the_old_file(s3, impatient, where):
    Storage(s3.url()).write(f"f/{where}", b"old")
    method = "PUT" if where == "partNumber" else "POST"
    with s3.faults(*["500"] * 50, on=(method,), path=where), pytest.raises(OSError, match="AWS Error"):
        impatient.write(f"f/{where}", DATA)
    assert impatient.read(f"f/{where}") == b"old"
    with s3.faults(*["500"] * 50, on=(method,), path=where), pytest.raises(OSError, match="AWS Error"):
        impatient.write(f"f/new-{where}", DATA)
    assert not impatient.exists(f"f/new-{where}")


@pytest.mark.slow
def test_a_reader_sees_the_old_file_or_the_new_one(s3):
    """Read again and again while large files replace one another through a failing server."""
    storage, whole = Storage(s3.url()), {bytes([n]) * 6_000_000 for n in range(3)}
    storage.write("r", b"\0" * 6_000_000)
    stop, seen = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            seen.append(storage.read("r"))

    reader = threading.Thread(target=read)
    reader.start()
    with s3.faults("500", "cut", "503", "cut", on=("PUT",)):
        for data in sorted(whole):
            storage.write("r", data)
    stop.set()
    reader.join()
    assert seen
    assert set(seen) <= whole


def test_shards_and_labels_through_a_failing_server_are_those_of_a_local_disk(s3, tmp_path):
    centroids_KD = np.random.default_rng(0).standard_normal((8, 39), dtype=np.float32)
    files = [
        f"{CORPUS}/{layout.audio_shard('s')}",
        f"{CORPUS}/{layout.manifest_part('s')}",
        f"labels/{layout.part('s')}",
    ]
    faults = [fault for fault in ("500", "cut", "503") for _ in range(2)]

    def work(storage: Storage) -> list[bytes]:
        table = write_shard(storage, CORPUS, "s", [utterance(f"u{n}", n) for n in range(9)]).manifest
        storage.write(files[1], schemas.encode(table))
        Labeller(storage, CORPUS, "labels", TeacherAt(Mfcc(), None), Codebook(centroids_KD, (8,)), "cpu")("s")
        return [storage.read(file) for file in files]

    with s3.faults(*faults, "truncated", "slow", on=("GET", "PUT")):
        remote = work(Storage(s3.url("chain")))
        assert [fault for _, _, fault in s3.log if fault] == [*faults, "truncated", "slow"]
    assert remote == work(Storage(str(tmp_path)))
