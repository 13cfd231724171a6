"""Are errors counted as edits, summed before the rate is taken, and empty references told apart?"""

import math

import pytest

from hubert_ray.asr.wer import ErrorRate, character_errors, word_errors


def test_words():
    assert word_errors("A B C D E F G", "A X C E F N G") == ErrorRate(3, 7, 1, 1, 1)
    assert word_errors("THE CAT", "THE CAT").rate == 0.0


def test_characters_count_the_space_between_words():
    assert character_errors("A CAT", "A  CUT") == ErrorRate(1, 5, 1, 0, 0)
    assert character_errors("A CAT", "ACAT") == ErrorRate(1, 5, 0, 1, 0)


def test_the_total_is_errors_over_words_not_the_mean_of_rates():
    shards = [word_errors("A", "B"), word_errors("C D E", "C D E")]
    assert [shard.rate for shard in shards] == [1.0, 0.0]
    assert sum(shards, ErrorRate()).rate == 0.25
    assert sum(shards, ErrorRate()) == shards[1] + shards[0]


@pytest.mark.parametrize("count", [word_errors, character_errors])
def test_empty_texts(count):
    assert count("", "") == ErrorRate() and count("", "").rate == 0.0
    assert count("", "A").insertions == 1 and count("", "A").rate == math.inf
    assert count("A", "") == ErrorRate(1, 1, 0, 1, 0)
    assert (count("", "A") + count("B", "B")).rate == 1.0


def test_an_inconsistent_sum_cannot_be_made():
    with pytest.raises(AssertionError):
        ErrorRate(errors=2, reference_units=5, substitutions=1)
