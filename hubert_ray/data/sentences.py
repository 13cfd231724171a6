"""What is said in the embedded corpus? Sentences of a small grammar, of which each belongs to one split for ever.

A few dozen common words, so that a small model can learn to spell them; thousands of sentences, so that none is learned
by heart.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Literal

import numpy as np

Split = Literal["train", "dev", "test"]

# Lower case expands, upper case is a word, `|` separates choices of equal weight. "A" becomes "AN" before a vowel.
GRAMMAR = {
    "sentence": "person did thing place | person did thing when | person went place | person went place when"
    " | when group did thing place | group did thing AND went place | person did thing AND went when"
    " | when person went place | person went AND group did thing | group went place AND did thing",
    "person": "owner human | owner mood human",
    "thing": "owner object | owner look object | family FATHER'S object",
    "place": "where THE site | where A site | where THE OLD site | where family site",
    "owner": "THE | A | MY | HER",
    "family": "MY | HER",
    "human": "BOY | GIRL | FATHER | MOTHER | TEACHER | DOCTOR | CHILD | FISHERMAN",
    "mood": "OLD | YOUNG | HAPPY | GOOD",
    "object": "BOOK | COIN | WATCH | TELEVISION | TREASURE | CAKE | JACKET | BREAD",
    "look": "SMALL | GREEN | YELLOW | THIN | GOOD | OLD",
    "site": "GARDEN | BRIDGE | HOUSE | RIVER | CHURCH | KITCHEN | SHOP",
    "where": "NEAR | BEHIND | ACROSS | THROUGH | WITHIN",
    "did": "FOUND | SAW | TOOK | BROUGHT | WASHED | PUSHED",
    "went": "WALKED | SANG | SLEPT | STOOD",
    "when": "TODAY | NOW | AGAIN | YESTERDAY",
    "group": "THEY | WE",
}
MIN_WORDS, MAX_WORDS = 5, 9
_CHOICES = {name: [choice.split() for choice in body.split("|")] for name, body in GRAMMAR.items()}


def vocabulary() -> list[str]:
    """Every word that a transcript can hold."""
    words = {word for choices in _CHOICES.values() for choice in choices for word in choice if word not in _CHOICES}
    return sorted(words | {"AN"})


def _expand(symbol: str, rng: np.random.Generator) -> list[str]:
    if symbol not in _CHOICES:
        return [symbol]
    choices = _CHOICES[symbol]
    return [word for part in choices[rng.integers(len(choices))] for word in _expand(part, rng)]


def split_of(sentence: str) -> Split:
    """The one split that may hold this sentence: 8 in 10 train, 1 dev, 1 test, by its hash."""
    bucket = hashlib.sha256(sentence.encode()).digest()[0] % 10
    return "dev" if bucket == 0 else "test" if bucket == 1 else "train"


def sentences(split: Split, count: int, rng: np.random.Generator) -> list[str]:
    """`count` distinct sentences of one split, in the order drawn."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        words = _expand("sentence", rng)
        pairs = pairwise([*words, "."])
        articles = ["AN" if word == "A" and after[0] in "AEIOU" else word for word, after in pairs]
        sentence = " ".join(articles)
        if MIN_WORDS <= len(words) <= MAX_WORDS and split_of(sentence) == split:
            drawn[sentence] = None
    return list(drawn)
