"""Which symbols does the recogniser emit, and how is a transcript spelled in them?

The paper's 29 (HuBERT (Hsu et al. 2021) II-E): the CTC blank, the word separator `|`, the apostrophe, A-Z. A word is its
letters followed by one `|`, so a transcript ends with `|` too, as in fairseq's `examples/wav2vec/libri_labels.py`: the
decoder closes a word only at a `|`.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable

from hubert_ray.errors import CorpusError

BLANK = 0
SEPARATOR = 1
ALPHABET: tuple[str, ...] = ("<blank>", "|", "'", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ")

_ID_OF = {symbol: number for number, symbol in enumerate(ALPHABET)}
_SPELLABLE = frozenset(ALPHABET[SEPARATOR + 1 :])
_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u201b\u02bc\u2032\u00b4`\uff07"), "'")
# Marks that are not spoken. Listed, not taken from Unicode's classes: those also hold % & @ #, which are words, and
# brackets and underscores, which are annotations such as [noise]; all of these must be refused, not lost.
_SILENT = dict.fromkeys(
    map(
        ord,
        '.,;:!?()"-\u00a1\u00bf\u00ab\u00bb\u2026\u00b7\u00ad\u201c\u201d\u201e\u2010\u2011\u2012\u2013\u2014\u2015',
    ),
    " ",
)


class UnspellableTextError(CorpusError):
    """A transcript holds characters that the 29 symbols cannot spell; `characters` are those, sorted."""

    def __init__(self, text: str, characters: Iterable[str]):
        self.text = text
        self.characters = tuple(sorted(set(characters)))
        named = ", ".join(f"{c!r} (U+{ord(c):04X} {unicodedata.name(c, 'unnamed')})" for c in self.characters)
        super().__init__(
            f"cannot spell {named} of {text[:120]!r}; expected letters A-Z, apostrophes and spaces; "
            "write it out in words (numbers too), or drop this transcript"
        )

    def __reduce__(self):
        return type(self), (self.text, self.characters)


def normalise(text: str) -> str:
    """`text` as the recogniser writes it: upper case, one kind of apostrophe, no punctuation, single spaces.

    Accents of Latin letters are dropped (`café` -> `CAFE`); hyphens and dashes part words. Raises UnspellableTextError
    for what is spoken but not spelled here: digits, symbols such as `%`, letters of other scripts, annotations.
    """
    upper = text.translate(_APOSTROPHES).translate(_SILENT).upper()
    bare = "".join(c for c in unicodedata.normalize("NFD", upper) if not unicodedata.combining(c))
    words = [word for word in bare.split() if word.strip("'")]
    _refuse_unspellable(text, words)
    return " ".join(words)


def encode(text: str) -> list[int]:
    """Ids of a normalised text, every word closed by `|`; no ids for an empty text."""
    words = text.split()
    _refuse_unspellable(text, words)
    return [_ID_OF[symbol] for word in words for symbol in (*word, "|")]


def decode(ids: Iterable[int]) -> str:
    """Text of one id per frame: repeats are merged, then blanks dropped, then words parted at `|`."""
    merged = [number for number, _ in itertools.groupby(ids)]
    assert all(0 <= number < len(ALPHABET) for number in merged), f"ids outside 0..{len(ALPHABET) - 1}: {merged}"
    letters = "".join(ALPHABET[number] for number in merged if number != BLANK)
    return " ".join(word for word in letters.split("|") if word)


def _refuse_unspellable(text: str, words: Iterable[str]) -> None:
    strange = {character for word in words for character in word} - _SPELLABLE
    if strange:
        raise UnspellableTextError(text, strange)
