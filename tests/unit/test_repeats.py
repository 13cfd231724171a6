"""Are all repeats found, each with its earliest, however keys and places are spread?"""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_ray.data.repeats import RepeatFinder, set_repeats_aside
from hubert_ray.data.shards import Manifest, RawUtterance, write_shard
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage

# Keys that differ in their first byte (other buckets), in the middle, and in the last.
KEYS = [bytes([a, *[0] * 7, b, *[0] * 6, c]) for a in (0, 3, 4, 255) for b in (0, 128) for c in (0, 1)]


def oracle(rows: list[tuple[int, int]], but: set[int]) -> dict[int, int]:
    first: dict[int, int] = {}
    found = {}
    for place, key in sorted((place, key) for key, place in rows if place not in but):
        if key in first:
            found[place] = first[key]
        else:
            first[key] = place
    return found


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, len(KEYS) - 1), max_size=40), st.randoms(), st.sets(st.integers(0, 39)), st.integers(1, 7)
)
def test_repeats_are_those_of_a_dictionary(keys, random, excluded, size):
    places = [number + (random.randint(0, 2) << 60) for number in range(len(keys))]
    rows = list(zip(keys, places, strict=True))
    random.shuffle(rows)
    but = {places[number] for number in excluded if number < len(places)}
    with RepeatFinder() as finder:
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            finder.add(b"".join(KEYS[key] for key, _ in some), np.array([place for _, place in some], dtype=np.uint64))
        later_R, first_R = finder.repeats(np.array(sorted(but), dtype=np.uint64))
    assert dict(zip(later_R.tolist(), first_R.tolist(), strict=True)) == oracle(rows, but)
    assert later_R.tolist() == sorted(later_R.tolist())


# --- parts of a corpus ------------------------------------------------------------------------------------------------

PATH = "corpora/c"
# shard -> (id, seed of the samples) of its rows
SHARDS = {
    "x-0": [("c", 3), ("a", 4)],
    "x-1": [("d", 2), ("a", 1)],
    "x-2": [("e", 1), ("b", 2)],  # the samples of the second `a`, which goes for its id; and those of `d`
    "x-3": [("e", 5), ("f", 3)],
}


def utterance(name: str, seed: int) -> RawUtterance:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.random.default_rng(seed).standard_normal(2000), 16_000, format="FLAC")
    return RawUtterance(name, "s", "train", "flac", buffer.getvalue())


def written(storage: Storage, shards: dict[str, list[tuple[str, int]]] = SHARDS) -> Storage:
    for shard, rows in shards.items():
        tables = write_shard(storage, PATH, shard, [utterance(*row) for row in rows])
        assert tables.quarantine.num_rows == 0
        storage.write(f"{PATH}/{layout.manifest_part(shard)}", schemas.encode(tables.manifest))
    return storage


def kept(storage: Storage) -> list[str]:
    parts = [Manifest.read_shard(storage, PATH, shard).table["utterance_id"].to_pylist() for shard in SHARDS]
    return [name for part in parts for name in part]


def aside(storage: Storage) -> list[tuple[str, ...]]:
    return [tuple(row.values()) for row in schemas.decode(storage.read(f"{PATH}/{layout.REPEATS}")).to_pylist()]


KEPT = ["c", "a", "d", "e"]
ASIDE = [
    ("x-1", "a", "duplicate_id", "the id of 'a' in shard x-0"),
    ("x-2", "b", "duplicate_content", "the samples of 'd' in shard x-1"),
    ("x-3", "f", "duplicate_content", "the samples of 'c' in shard x-0"),
    ("x-3", "e", "duplicate_id", "the id of 'e' in shard x-2"),
]


def test_what_a_shard_before_has_goes(tmp_path):
    storage = written(Storage(str(tmp_path)))
    for _ in range(2):  # done again, nothing more goes
        set_repeats_aside(storage, PATH, dict.fromkeys(SHARDS, True))
        assert (kept(storage), aside(storage)) == (KEPT, ASIDE)


def test_samples_may_repeat_but_ids_may_not(tmp_path):
    storage = written(Storage(str(tmp_path)))
    set_repeats_aside(storage, PATH, dict.fromkeys(SHARDS, False))
    assert kept(storage) == ["c", "a", "d", "e", "b", "f"]
    assert aside(storage) == [row for row in ASIDE if row[2] == "duplicate_id"]


def test_shards_that_may_repeat_samples_free_no_other(tmp_path):
    storage = written(Storage(str(tmp_path)))
    set_repeats_aside(storage, PATH, dict.fromkeys(SHARDS, True) | {"x-0": False, "x-2": False})
    assert kept(storage) == ["c", "a", "d", "e", "b"]
    assert aside(storage) == [row for row in ASIDE if row[1] != "b"]


def test_earlier_parts_are_read_once_for_a_later_one(tmp_path):
    class Counting(Storage):
        reads = 0

        def read(self, path: str) -> bytes:
            self.reads += layout.MANIFEST in path
            return super().read(path)

    earlier = {f"y-{number:02}": [(f"{number}-0", 2 * number), (f"{number}-1", 2 * number + 1)] for number in range(20)}
    in_turns = [(f"again-{seed}", seed) for seed in (*range(0, 40, 2), *range(1, 40, 2))]
    shards = earlier | {"y-20": in_turns}
    storage = Counting(str(tmp_path))
    set_repeats_aside(written(storage, shards), PATH, dict.fromkeys(shards, True))
    assert len(aside(storage)) == 40
    assert storage.reads == 21 + 21 + 1  # for keys, for names, and of the part that is written anew


@pytest.mark.parametrize("survives", [0, 1])
def test_what_was_broken_off_goes_on(tmp_path, survives):
    class Breaking(Storage):
        writes = 0

        def write(self, path: str, data: bytes) -> None:
            if self.writes == survives:
                raise OSError("the machine is gone")
            self.writes += 1
            super().write(path, data)

    storage = written(Storage(str(tmp_path)))
    with pytest.raises(OSError, match="gone"):
        set_repeats_aside(Breaking(str(tmp_path)), PATH, dict.fromkeys(SHARDS, True))
    assert len(kept(storage)) == 8 - survives
    set_repeats_aside(storage, PATH, dict.fromkeys(SHARDS, True))
    assert (kept(storage), aside(storage)) == (KEPT, ASIDE)
