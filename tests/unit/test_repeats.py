"""Are all repeats found, each with its earliest, however keys and places are spread?"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_ray.data.repeats import RepeatFinder

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
