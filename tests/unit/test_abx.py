"""ABX of a handful of phones against triples counted one by one. fastabx is an extra, for Python 3.12."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from hubert_ray.errors import RecipeError
from hubert_ray.units import abx
from hubert_ray.units.abx import abx_error, frames_between, is_noise

needs_fastabx = pytest.mark.skipif(abx.find_spec("fastabx") is None, reason="fastabx is not installed")


def spoken(names: str, samples: int = 320) -> list[dict]:
    """Phones of one letter, one after the other; `-` is silence."""
    return [
        {"start": samples * n, "end": samples * (n + 1), "phone": "SIL" if name == "-" else name}
        for n, name in enumerate(names)
    ]


def angle(a, b):
    return np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)) / np.pi


def slow_abx(tokens) -> float:
    """Mean over neighbours, speakers and pairs of kinds; tokens are (kind, neighbours, speaker, vector)."""
    by_pair: dict = {}
    for kind_a, kind_b in product(sorted({t[0] for t in tokens}), repeat=2):
        by_speaker: dict = {}
        for where in {(t[1], t[2]) for t in tokens}:
            a, b = ([t[3] for t in tokens if t[0] == kind and (t[1], t[2]) == where] for kind in (kind_a, kind_b))
            if kind_a == kind_b or len(a) < 2 or not b:
                continue
            wrong = [
                (angle(x, y) < angle(x, a[i])) + 0.5 * (angle(x, y) == angle(x, a[i]))
                for (j, x), y, i in product(enumerate(a), b, range(len(a)))
                if i != j
            ]
            by_speaker.setdefault(where[1], []).append(np.mean(wrong))
        if by_speaker:
            by_pair[kind_a, kind_b] = np.mean([np.mean(cells) for cells in by_speaker.values()])
    return float(np.mean(list(by_pair.values())))


@needs_fastabx
def test_the_error_is_that_of_triples_counted_one_by_one():
    """Phones of one frame, so that there is nothing to warp."""
    rng = np.random.default_rng(0)
    features, phones, speakers, tokens = [], [], [], []
    for number in range(30):
        names = "-" + "".join(rng.choice(list("ABC"), 6)) + "-"
        frames = (rng.standard_normal((8, 5)) + [[2 * (name == kind) for kind in "ABC-+"] for name in names]).astype(
            "f4"
        )
        features.append(frames)
        phones.append(spoken(names))
        speakers.append(f"s{number % 2}")
        tokens += [(names[n], (names[n - 1], names[n + 1]), speakers[-1], frames[n]) for n in range(1, 7)]
    by_place = {(t[0], t[1], t[2]): 0 for t in tokens}
    for t in tokens:
        by_place[t[0], t[1], t[2]] += 1
    assert max(by_place.values()) <= abx.MOST_OF_A_KIND
    found = abx_error(features, phones, speakers, 50)
    assert found == pytest.approx(slow_abx(tokens), abs=1e-4)
    assert 0.05 < found < 0.4


@needs_fastabx
def test_phones_apart_and_phones_alike():
    rng = np.random.default_rng(0)
    phones = [spoken("-ATBT-", samples=1600)] * 8 + [spoken("-BTAT-", samples=1600)] * 8
    kinds = {"SIL": 0, "A": 1, "B": 2, "T": 3}
    codes = [np.repeat([kinds[p["phone"]] for p in of], 10) for of in phones]
    apart = [np.eye(4, dtype="f4")[code] + 0.01 * rng.standard_normal((60, 4)).astype("f4") for code in codes]
    alike = [rng.standard_normal((60, 4)).astype("f4") for _ in codes]
    assert abx_error(apart, phones, ["s"] * 16, 100) == pytest.approx(0.0)
    assert abx_error(alike, phones, ["s"] * 16, 100) == pytest.approx(0.5, abs=0.15)


@needs_fastabx
@pytest.mark.parametrize("names", ["", "---", "-A-", "-AB-AC-"])
def test_where_nothing_can_be_compared(names):
    features = [np.ones((len(names) + 1, 3), dtype="f4")]
    assert abx_error(features, [spoken(names)], ["s"], 50) is None
    assert abx_error(features, [None], ["s"], 50) is None


def test_frames_whose_centres_lie_between_two_times():
    for rate, step in ((50, 320), (100, 160)):
        for start, end in ((0, 0), (0, 320), (100, 900), (159, 161), (161, 479), (4000, 4001)):
            between = [n for n in range(40) if start <= n * step + step / 2 <= end]
            assert list(range(40))[frames_between(start, end, rate)] == between


def test_silence_and_noise_are_not_compared():
    assert all(map(is_noise, ["SIL", "spn", "+NSN+", "<unk>", "[laugh]"]))
    assert not any(map(is_noise, ["AH", "sh", "tʃ", "S"]))


@pytest.mark.skipif(abx.find_spec("fastabx") is not None, reason="fastabx is installed")
def test_without_fastabx_the_way_out_is_said():
    with pytest.raises(RecipeError, match=r"hubert-ray\[abx\]"):
        abx.check_installed()
