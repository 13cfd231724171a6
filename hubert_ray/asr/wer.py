"""How many words (or characters) are wrong, in an utterance and in total?

Errors are counted with jiwer's alignment and summed; a rate is taken only of a sum. The rate of a test set is therefore
all errors over all reference words, never a mean of per-utterance rates, and shards can be added in any order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jiwer


@dataclass(frozen=True)
class ErrorRate:
    """Edit errors against a reference of `reference_units` words or characters."""

    errors: int = 0
    reference_units: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    def __post_init__(self):
        assert self.errors == self.substitutions + self.deletions + self.insertions, self
        assert self.substitutions + self.deletions <= self.reference_units, self

    @property
    def rate(self) -> float:
        """Errors per reference unit, 1.0 = 100 %. Without any reference: 0 if nothing was recognised, else infinite."""
        if self.reference_units == 0:
            return math.inf if self.errors else 0.0
        return self.errors / self.reference_units

    def __add__(self, other: ErrorRate) -> ErrorRate:
        return ErrorRate(
            errors=self.errors + other.errors,
            reference_units=self.reference_units + other.reference_units,
            substitutions=self.substitutions + other.substitutions,
            deletions=self.deletions + other.deletions,
            insertions=self.insertions + other.insertions,
        )


def word_errors(reference: str, hypothesis: str) -> ErrorRate:
    """Errors in words. An empty reference makes every recognised word an insertion."""
    return _counted(jiwer.process_words(reference, hypothesis))


def character_errors(reference: str, hypothesis: str) -> ErrorRate:
    """Errors in characters, of which the single space between two words is one."""
    return _counted(jiwer.process_characters(" ".join(reference.split()), " ".join(hypothesis.split())))


def _counted(alignment: jiwer.WordOutput | jiwer.CharacterOutput) -> ErrorRate:
    return ErrorRate(
        errors=alignment.substitutions + alignment.deletions + alignment.insertions,
        reference_units=alignment.hits + alignment.substitutions + alignment.deletions,
        substitutions=alignment.substitutions,
        deletions=alignment.deletions,
        insertions=alignment.insertions,
    )
