"""Is audio read ahead in order, no further than allowed, by many threads at once; and is the cache of ranges never wrong?"""

from __future__ import annotations

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from hubert_ray.data import audio
from hubert_ray.data.collate import UtteranceReader
from hubert_ray.data.loader import FETCHES, ahead
from hubert_ray.data.shards import AudioReader, Manifest, write_shard
from hubert_ray.storage.cache import RangeCache
from hubert_ray.storage.filesystem import Storage
from tests.unit.test_shards import CORPUS, utterance


def test_results_come_in_order_whoever_is_done_first():
    pauses = np.random.default_rng(0).uniform(0, 0.01, 40)

    def load(n: int) -> int:
        time.sleep(pauses[n])
        return n

    assert list(ahead(load, range(40), 6)) == list(range(40))
    assert list(ahead(load, [], 3)) == []


def test_no_more_than_depth_are_loaded_before_their_turn():
    begun, running, most = [], [], []

    def load(n: int) -> int:
        begun.append(n)
        running.append(n)
        most.append(len(running))
        time.sleep(0.002)
        running.remove(n)
        return n

    for n in ahead(load, iter(range(30)), 3):
        time.sleep(0.004)
        assert max(begun) <= n + 3
    assert 1 < max(most) <= 3


def test_an_error_is_raised_at_its_own_turn_and_ends_the_rest():
    begun = []

    def load(n: int) -> int:
        begun.append(n)
        if n == 5:
            raise OSError("range 5")
        time.sleep(0.005)
        return n

    got = []
    with pytest.raises(OSError, match="range 5"):
        for n in ahead(load, range(1000), 4):
            got.append(n)
    assert got == [0, 1, 2, 3, 4]
    assert max(begun) <= 9


def test_who_stops_early_leaves_no_thread():
    before = threading.active_count()
    results = ahead(lambda n: n, range(1000), 4)
    assert next(results) == 0
    results.close()
    assert threading.active_count() <= before


@pytest.fixture
def storage(tmp_path) -> Storage:
    storage = Storage(str(tmp_path / "storage"))
    write_shard(storage, CORPUS, "train-00000", [utterance(f"a{n}", n) for n in range(12)])
    return storage


def manifest_of(storage: Storage, shards: int = 3) -> Manifest:
    tables = [
        write_shard(storage, CORPUS, f"train-{k:05d}", [utterance(f"{k}-{n}", 10 * k + n) for n in range(10)]).manifest
        for k in range(shards)
    ]
    return Manifest(pa.concat_tables(tables))


def test_many_threads_read_many_shards_through_few_open_files(storage):
    manifest = manifest_of(storage)
    order = np.random.default_rng(0).integers(0, len(manifest), 300).tolist()
    expected = [audio.decode(utterance("x", 10 * (row // 10) + row % 10).audio) for row in range(len(manifest))]
    reader = UtteranceReader(AudioReader(storage, CORPUS, keep_open=1), manifest, normalize=False)
    for row, wave_S in zip(order, reader.waves(order), strict=True):
        assert np.array_equal(wave_S, expected[row])


@pytest.mark.parametrize("cpus", [1, 3])
def test_as_many_decode_at_a_time_as_the_worker_has_cpus_while_more_are_fetched(storage, monkeypatch, cpus):
    monkeypatch.setenv("OMP_NUM_THREADS", str(cpus))
    manifest, decode = manifest_of(storage), audio.decode
    running, most, fetching, fetched = [], [], [], []

    def slow_decode(data):
        running.append(0)
        most.append(len(running))
        time.sleep(0.003)
        running.pop()
        return decode(data)

    class Slow(AudioReader):
        def read(self, *at):
            fetching.append(0)
            fetched.append(len(fetching))
            time.sleep(0.01)
            fetching.pop()
            return super().read(*at)

    monkeypatch.setattr(audio, "decode", slow_decode)
    UtteranceReader(Slow(storage, CORPUS), manifest, normalize=False).waves(range(len(manifest)))
    assert max(most) == cpus
    assert cpus < max(fetched) <= FETCHES


# --- the cache --------------------------------------------------------------------------------------------------------


class Remote(Storage):
    """A local folder that counts what is read of it and passes for an object store."""

    is_local = False

    def open(self, path):
        counted, file = self.reads, super().open(path)

        class Counting:
            def read_at(self, size, offset):
                counted.append((offset, size))
                return file.read_at(size, offset)

        return Counting()


@pytest.fixture
def remote(storage, tmp_path):
    found = Remote(storage.url, RangeCache(str(tmp_path / "cache"), 2**28))
    found.reads = []
    return found


def rows_of(storage: Storage) -> list[dict]:
    return write_shard(storage, CORPUS, "train-00000", [utterance(f"a{n}", n) for n in range(12)]).manifest.to_pylist()


def read_all(storage: Storage, rows: list[dict]) -> list[bytes]:
    reader = AudioReader(storage, CORPUS)
    return [reader.read(row["shard"], row["offset"], row["size"]) for row in rows]


def test_what_was_read_once_is_not_fetched_again_by_any_reader(storage, remote):
    rows = rows_of(storage)
    first = read_all(remote, rows)
    assert first == [utterance("x", n).audio for n in range(12)]
    assert len(remote.reads) == 12
    assert read_all(remote, rows) == first
    assert len(remote.reads) == 12


def test_a_corpus_made_anew_in_the_same_place_is_not_taken_from_the_cache(storage, remote):
    rows = rows_of(storage)
    read_all(remote, rows)
    path = f"{storage.root}/{CORPUS}/audio/train-00000.tar"
    changed = bytes(255 - byte for byte in storage.read(f"{CORPUS}/audio/train-00000.tar"))  # the same length
    storage.write(f"{CORPUS}/audio/train-00000.tar", changed)
    os.utime(path, ns=(0, 0))
    assert read_all(remote, rows[:1])[0] == changed[rows[0]["offset"] :][: rows[0]["size"]]


def test_a_local_folder_is_never_cached(storage, tmp_path):
    local = Storage(storage.url, RangeCache(str(tmp_path / "cache"), 2**28))
    read_all(local, rows_of(storage))
    assert not (tmp_path / "cache").exists()


def test_a_damaged_or_emptied_entry_is_read_again(storage, remote, tmp_path):
    rows = rows_of(storage)
    first = read_all(remote, rows)
    kept = sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert len(kept) == 12
    for path, harm in zip(kept, [b"", b"abc", b"\0" * kept[2].stat().st_size] * 4, strict=True):
        path.write_bytes(harm)
    kept[3].write_bytes(kept[3].read_bytes()[:-1])
    assert read_all(remote, rows) == first
    assert len(remote.reads) == 24
    assert read_all(remote, rows) == first
    assert len(remote.reads) == 24


@pytest.mark.slow
def test_the_budget_holds_and_the_oldest_go_first(tmp_path):
    cache, data = RangeCache(str(tmp_path), 256 * 40_000), b"x" * 1000  # 40 entries to a folder
    cache.put("often", data)
    for n in range(40_000):
        cache.put(str(n), data)
        if n % 100 == 0:
            assert cache.get("often") == data, n
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    assert 0.8 * cache.budget < size < 1.3 * cache.budget  # shares this small overshoot by the 16 writes between sweeps
    recent, old = (sum(cache.get(str(n)) is not None for n in part) for part in (range(38_000, 40_000), range(2000)))
    assert recent > 1900
    assert old == 0


def test_many_writers_and_sweepers_never_show_half_an_entry(tmp_path):
    cache = RangeCache(str(tmp_path), 256 * 8_000)

    def work(seed: int) -> int:
        rng, hits = np.random.default_rng(seed), 0
        for n in rng.integers(0, 100, 300).tolist():
            data = bytes([n % 251]) * (2000 + n)
            found = cache.get(str(n))
            hits += found is not None
            assert found in (None, data)
            cache.put(str(n), data)
        return hits

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) > 200


def test_a_full_disk_costs_the_cache_and_not_the_run(storage, remote, tmp_path, monkeypatch):
    rows = rows_of(storage)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert read_all(remote, rows) == [utterance("x", n).audio for n in range(12)]
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_cache_that_cannot_be_made_costs_nothing_else():
    cache = RangeCache("/proc/nowhere", 2**20)
    cache.put("a", b"1")
    assert cache.get("a") is None


def test_an_entry_larger_than_a_share_is_left_out(tmp_path):
    cache = RangeCache(str(tmp_path), 256 * 1000)
    cache.put("a", b"1" * 2000)
    assert cache.get("a") is None
