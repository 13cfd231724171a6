"""How is a range shuffled without holding it? By a keyed permutation, of which any place can be asked for alone.

The same key gives the same order everywhere and at once: nothing is stored, so a range of 200 million costs what one of ten
costs, and a resumed run needs no state. Short ranges are shuffled outright, which is exactly uniform. Longer ones go through a
Feistel network over pairs of numbers: a bijection whatever its round function, hence a permutation. There are slightly more
pairs than places; what lands beyond the range goes through again until it falls inside (generalised Feistel cipher with cycle
walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Rounds mix by the finaliser of splitmix64.
"""

from __future__ import annotations

import math

import numpy as np

OUTRIGHT = 4096  # up to here a permutation is made in 0.1 ms
ROUNDS = 8


class Shuffle:
    """A permutation of 0 … size - 1, chosen by `key`, numbers from 0 on. Calling it gives what stands at the places asked for."""

    def __init__(self, size: int, *key: int):
        self._size = size
        seeds = np.random.SeedSequence([len(key), *key])  # with its length, since to numpy (1, 2) is (1, 2, 0)
        self._whole = None
        if size <= OUTRIGHT:
            self._whole = np.random.Generator(np.random.Philox(seeds)).permutation(size)
        else:
            side = math.isqrt(size - 1) + 1
            self._sides = np.uint64(-(-size // side)), np.uint64(side)  # of the pairs (left, right)
            self._keys = seeds.generate_state(ROUNDS, np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Places from 0 to size - 1, (n,) int64 in and out."""
        if self._whole is not None:
            return self._whole[places]
        values = self._turn(places.astype(np.uint64))
        while len(outside := np.flatnonzero(values >= self._size)):
            values[outside] = self._turn(values[outside])
        return values.astype(np.int64)

    def _turn(self, values: np.ndarray) -> np.ndarray:
        """Once through the network: each round adds a function of one number to the other, modulo its side."""
        moved, still = 0, 1
        pair = list(np.divmod(values, self._sides[1]))
        for key in self._keys:
            pair[moved] = (pair[moved] + _mixed(pair[still] + key) % self._sides[moved]) % self._sides[moved]
            moved, still = still, moved
        return pair[0] * self._sides[1] + pair[1]


def _mixed(values: np.ndarray) -> np.ndarray:
    """Every bit of the result hangs on every bit of the value. uint64; overflow is part of it."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
