"""units/quality.py against a slow oracle that goes frame by frame and follows the formulas of HuBERT IV-E to the letter."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_ray.units.quality import PhoneCounts, entropy_bits, predictability, rank_correlation

CLUSTERS = 6


def oracle(utterances) -> tuple[float, float, float, int] | None:
    """(PNMI, phone purity, cluster purity, frames of 10 ms) of (phones, labels, rate) triples; None without a common frame."""
    pairs = []
    for phones, labels, rate in utterances:
        spoken = {}  # 10 ms frame -> phone
        for phone in phones:
            for frame in range(round(phone["start"] / 160), round(phone["end"] / 160)):
                spoken[frame] = "".join(letter for letter in phone["phone"] if letter not in "012")
        for frame in range(len(labels) * (100 // rate)):
            if frame in spoken:
                pairs.append((spoken[frame], labels[frame * rate // 100]))
    if not pairs:
        return None
    p = {pair: count / len(pairs) for pair, count in Counter(pairs).items()}
    p_y = {y: sum(y_ == y for y_, _ in pairs) / len(pairs) for y in {y for y, _ in pairs}}
    p_z = {z: sum(z_ == z for _, z_ in pairs) / len(pairs) for z in {z for _, z in pairs}}
    information = sum(v * math.log(v / (p_y[y] * p_z[z])) for (y, z), v in p.items())
    entropy = -sum(v * math.log(v) for v in p_y.values())
    phone_purity = sum(max(p.get((y, z), 0.0) for y in p_y) for z in p_z)
    cluster_purity = sum(max(p.get((y, z), 0.0) for z in p_z) for y in p_y)
    return (information / entropy if entropy > 0 else 0.0), phone_purity, cluster_purity, len(pairs)


@st.composite
def utterance(draw):
    """Phones with gaps, on and off the 10 ms grid, shorter or longer than the labels; 50 or 100 labels a second."""
    phones, now = [], 0
    for gap, length, name in draw(
        st.lists(
            st.tuples(
                st.sampled_from([0, 0, 0, 160, 77]),
                st.integers(1, 900),
                st.sampled_from(["AH0", "AH1", "AH2", "T", "SIL", "spn"]),
            ),
            max_size=12,
        )
    ):
        now += gap
        phones.append({"start": now, "end": now + length, "phone": name})
        now += length
    labels = draw(st.lists(st.integers(0, CLUSTERS - 1), max_size=50))
    return phones, labels, draw(st.sampled_from([50, 100]))


@given(st.lists(utterance(), max_size=4))
@settings(max_examples=80, deadline=None)
def test_quality_is_that_of_the_oracle(utterances):
    counts = PhoneCounts(CLUSTERS)
    for phones, labels, rate in utterances:
        counts.add(phones, np.array(labels, dtype=np.int64), rate)
    found, expected = counts.quality(), oracle(utterances)
    if expected is None:
        assert found is None
        return
    assert (found.pnmi, found.phone_purity, found.cluster_purity) == pytest.approx(expected[:3], abs=1e-9)
    assert found.frames == expected[3]


@given(st.lists(utterance(), max_size=4), st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_counts_of_two_places_add_up_to_those_of_one(utterances, parted):
    here, there, whole = PhoneCounts(CLUSTERS), PhoneCounts(CLUSTERS), PhoneCounts(CLUSTERS)
    for number, (phones, labels, rate) in enumerate(utterances):
        for counts in (whole, here if number < parted else there):
            counts.add(phones, np.array(labels, dtype=np.int64), rate)
    here.merge(there.counts())
    assert here.counts() == whole.counts()


def test_counts_follow_the_10_ms_grid_at_both_rates():
    phones = [{"start": 0, "end": 640, "phone": "SIL"}, {"start": 640, "end": 1600, "phone": "AH1"}]
    at_50, at_100 = PhoneCounts(3), PhoneCounts(3)
    at_50.add(phones, np.array([0, 0, 1, 1, 2]), 50)
    at_100.add(phones, np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2]), 100)
    np.testing.assert_array_equal(at_50.table(), at_100.table())
    assert at_50.phones() == ["AH", "SIL"]
    np.testing.assert_array_equal(at_50.table(), [[0, 4, 2], [4, 0, 0]])


@pytest.mark.parametrize(("labels", "expected"), [([1, 1, 0], [[1, 2]]), ([1] * 300, [[0, 100]])])
def test_counts_end_with_the_shorter_sequence(labels, expected):
    counts = PhoneCounts(2)
    counts.add([{"start": 0, "end": 16_000, "phone": "A"}], np.array(labels), 100)
    np.testing.assert_array_equal(counts.table(), expected)


def test_perfect_and_useless_units():
    phones = [{"start": 1600 * n, "end": 1600 * (n + 1), "phone": "ABCD"[n % 4]} for n in range(8)]
    perfect, useless = PhoneCounts(4), PhoneCounts(4)
    perfect.add(phones, np.repeat(np.arange(8) % 4, 10), 100)
    useless.add(phones, np.zeros(80, dtype=np.int64), 100)
    assert perfect.quality().pnmi == pytest.approx(1.0)
    assert perfect.quality().phone_purity == perfect.quality().cluster_purity == pytest.approx(1.0)
    assert useless.quality().pnmi == pytest.approx(0.0)
    assert (useless.quality().phone_purity, useless.quality().cluster_purity) == pytest.approx((0.25, 1.0))


def test_entropy():
    assert entropy_bits(np.array([1, 1, 1, 1, 0])) == pytest.approx(2.0)


# --- without phones ---------------------------------------------------------------------------------------------------


def slow_predictability(labels, rate):
    """Two sums of p log2 (p / (p p)), pair by pair."""

    def information(pairs):
        n = len(pairs)
        p, p_a, p_b = Counter(pairs), Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
        return sum(c / n * math.log2(c * n / (p_a[a] * p_b[b])) for (a, b), c in p.items())

    near, far = (round(seconds * rate) for seconds in (0.3, 1.5))
    times = [(u, t) for u, of in enumerate(labels) for t in range(len(of) - far)]
    if not times:
        return 0.0
    return information([(labels[u][t], labels[u][t + near]) for u, t in times]) - information(
        [(labels[u][t], labels[u][t + far]) for u, t in times]
    )


@given(st.lists(st.lists(st.integers(0, 4), max_size=170), max_size=3), st.sampled_from([50, 100]))
@settings(max_examples=40, deadline=None)
def test_predictability_is_that_of_the_definition(labels, rate):
    found = predictability([np.array(of, dtype=np.uint16) for of in labels], rate)
    assert found == pytest.approx(slow_predictability(labels, rate), abs=1e-9)


def test_what_follows_what_is_told_from_noise_and_from_the_speaker():
    rng = np.random.default_rng(0)
    word = np.repeat([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], 15, axis=1)  # of 600 ms each
    spoken = [np.concatenate(word[rng.integers(0, 3, 12)]) for _ in range(60)]
    noise = [rng.integers(0, 12, 700) for _ in range(60)]
    speakers = [
        np.where(rng.random(700) < 0.9, 4 * (n % 3) + rng.integers(0, 4, 700), rng.integers(0, 12, 700))
        for n in range(60)
    ]
    assert predictability(spoken, 100) > 0.5
    assert abs(predictability(noise, 100)) < 0.01
    assert abs(predictability(speakers, 100)) < 0.01
    assert slow_predictability(speakers, 100) == pytest.approx(predictability(speakers, 100))


# --- ranks ------------------------------------------------------------------------------------------------------------


def slow_spearman(a, b):
    """Pearson's correlation of ranks, a rank being 1 + how many are smaller + half of the others that are equal."""
    ranks = [[sum(w < v for w in x) + (sum(w == v for w in x) + 1) / 2 for v in x] for x in (a, b)]
    return np.corrcoef(*ranks)[0, 1]


pairs_of_numbers = st.lists(st.tuples(st.integers(0, 9), st.floats(-5, 5)), min_size=3, max_size=30)


@given(pairs_of_numbers)
@settings(max_examples=60, deadline=None)
def test_rank_correlation_is_spearmans(pairs):
    a, b = zip(*pairs, strict=True)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(rank_correlation(a, b))
    else:
        assert rank_correlation(a, b) == pytest.approx(slow_spearman(a, b), abs=1e-9)
