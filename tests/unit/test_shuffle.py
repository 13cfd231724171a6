"""data/shuffle.py: every place once, every order as likely as any other, and each asked for alone."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_ray.data.shuffle import OUTRIGHT, Shuffle

LARGE = [OUTRIGHT + 1, 5000, 8192, 10_007, 2**16 + 1]


@given(size=st.integers(1, 20_000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_every_place_is_taken_once(size, seed, epoch):
    assert np.array_equal(np.sort(Shuffle(size, seed, epoch)(np.arange(size))), np.arange(size))


@given(size=st.integers(1, 2**40), seed=st.integers(0, 2**63), places=st.lists(st.integers(0, 2**40), max_size=20))
@settings(max_examples=60, deadline=None)
def test_places_are_asked_for_alone(size, seed, places):
    asked = np.array(places, dtype=np.int64) % size
    together = Shuffle(size, seed)(asked)
    assert together.dtype == np.int64
    assert ((together >= 0) & (together < size)).all()
    assert together.tolist() == [int(Shuffle(size, seed)(np.array([place]))[0]) for place in asked]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_order_of_a_few_is_as_likely(size):
    orders = {order: 0 for order in permutations(range(size))}
    draws = 100 * len(orders)
    for key in range(draws):
        orders[tuple(Shuffle(size, key)(np.arange(size)).tolist())] += 1
    counts = np.array(list(orders.values()))
    spread = ((counts - 100) ** 2 / 100).sum()  # chi-squared with len(orders) - 1 degrees of freedom
    freedom = len(orders) - 1
    assert abs(spread - freedom) < 5 * np.sqrt(2 * freedom) + 5


@pytest.mark.parametrize("size", LARGE)
def test_long_ranges_are_mixed_as_by_chance(size):
    """Where things go, who stays, who follows whom and how long cycles are: all as in random permutations."""
    fixed, follow, cycles, rises = [], [], [], []
    cells = np.zeros((16, 16))
    for key in range(40):
        order = Shuffle(size, key)(np.arange(size))
        np.add.at(cells, (np.arange(size) * 16 // size, order * 16 // size), 1)
        fixed.append((order == np.arange(size)).sum())
        follow.append((np.abs(np.diff(order)) == 1).sum())
        rises.append((np.diff(order) > 0).mean())
        cycles.append(_cycles(order))
    expected = cells.sum() / 256
    assert abs(((cells - expected) ** 2 / expected).sum() - 225) < 5 * np.sqrt(2 * 225)
    assert abs(np.mean(fixed) - 1) < 5 / np.sqrt(40)
    assert abs(np.mean(follow) - 2) < 5 * np.sqrt(2 / 40)
    assert abs(np.mean(rises) - 0.5) < 5 / np.sqrt(12 * size * 40)
    assert abs(np.mean(cycles) - (np.log(size) + 0.577)) < 5 * np.sqrt(np.log(size) / 40)


def _cycles(order: np.ndarray) -> int:
    seen, count = np.zeros(len(order), dtype=bool), 0
    for start in range(len(order)):
        count += not seen[start]
        while not seen[start]:
            seen[start], start = True, order[start]
    return count


@pytest.mark.parametrize("size", [50, 5000])
def test_keys_have_nothing_in_common(size):
    """Not even neighbours, or those that differ by a zero at the end."""
    orders = [Shuffle(size, *key)(np.arange(size)) for key in ((1, 2), (1, 2, 0), (1, 3), (2, 1), (0,), (0, 0))]
    for first in range(len(orders)):
        for second in range(first):
            assert (orders[first] == orders[second]).sum() < 10
