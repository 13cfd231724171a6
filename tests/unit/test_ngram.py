"""Is the n-gram model a probability distribution, the one of Kneser and Ney, and does ARPA keep it?"""

import math
import pickle
import random

import pytest

from hubert_ray.asr.ngram import BEGIN, END, UNKNOWN, ArpaError, NgramLM, estimate
from hubert_ray.errors import CorpusError


def babble(sentences: int, words: int, seed: int = 0) -> list[str]:
    """Sentences of Zipf-like words W1, W2, ..., some of them empty or of one word."""
    draw = random.Random(seed)
    names = [f"W{i}" for i in range(1, words + 1)]
    weights = [1 / i for i in range(1, words + 1)]
    return [" ".join(draw.choices(names, weights, k=draw.randrange(0, 9))) for _ in range(sentences)]


def probability(lm: NgramLM, context: tuple[str, ...], word: str) -> float:
    state = lm.start() if context[:1] == (BEGIN,) else ()
    for previous in context[1:] if context[:1] == (BEGIN,) else context:
        state, _ = lm.step(state, previous)
    return 10 ** (lm.finish(state) if word == END else lm.step(state, word)[1])


def test_a_case_worked_by_hand():
    """Two sentences; too few counts of counts, so discounts 0.5, 1, 1.5. Uniform part: A, B, C, </s>, <unk>."""
    lm = estimate(["A B", "A C"], order=2)
    # Distinct words before: A 1, B 1, C 1, </s> 2 of 5; discounts take 3 x 0.5 + 1 = 2.5 of 5 = weight 0.5.
    assert probability(lm, (), "A") == pytest.approx((1 - 0.5) / 5 + 0.5 / 5, abs=1e-6)
    assert probability(lm, (), END) == pytest.approx((2 - 1) / 5 + 0.5 / 5, abs=1e-6)
    assert probability(lm, (), "NEVER SEEN") == pytest.approx(0.5 / 5, abs=1e-6)
    assert probability(lm, (BEGIN,), "A") == pytest.approx((2 - 1) / 2 + 1 / 2 * 0.2, abs=1e-6)
    assert probability(lm, (BEGIN,), "B") == pytest.approx(1 / 2 * 0.2, abs=1e-6)
    assert probability(lm, ("A",), "B") == pytest.approx((1 - 0.5) / 2 + (0.5 + 0.5) / 2 * 0.2, abs=1e-6)
    assert probability(lm, ("B",), END) == pytest.approx((1 - 0.5) / 1 + 0.5 * 0.3, abs=1e-6)
    assert lm.score(["A", "B"]) == pytest.approx(math.log10(0.6 * 0.35 * 0.65), abs=1e-6)
    assert lm.perplexity(["A B"]) == pytest.approx((0.6 * 0.35 * 0.65) ** (-1 / 3), rel=1e-5)


def test_discounts_follow_the_counts_of_counts():
    """Four words once, two twice, one three times, </s> four times: Y = 4 / 8, D = 0.5, 1.25, 1."""
    lm = estimate(["A B C D", "E E F F", "G G", "G"], order=1)
    kept_back = (4 * 0.5 + 2 * 1.25 + 2 * 1) / 15
    for word, count, discount in (("A", 1, 0.5), ("E", 2, 1.25), ("G", 3, 1.0), (END, 4, 1.0)):
        assert probability(lm, (), word) == pytest.approx((count - discount) / 15 + kept_back / 9, abs=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("sentences", [1, 5, 400])
def test_every_context_sums_to_one(order, sentences):
    lm = estimate(iter(babble(sentences, 12) + ["W1"]), order)
    contexts = {ngram[:-1] for ngram in lm.log10_prob} | set(lm.log10_backoff) | {("W1", "W1", "W1"), ("W9", "NEW")}
    for context in contexts:
        total = sum(probability(lm, context, word) for word in [*lm.words, END, UNKNOWN])
        assert total == pytest.approx(1.0, abs=1e-5), context


def test_a_long_history_counts_and_an_unseen_one_backs_off():
    lm = estimate(babble(300, 8), order=3)
    trigram = next(g for g in sorted(lm.log10_prob) if len(g) == 3 and BEGIN not in g and END not in g)
    assert math.log10(probability(lm, trigram[:2], trigram[2])) == pytest.approx(lm.log10_prob[trigram])
    unseen = next(
        (*c, w) for c in sorted(lm.log10_backoff) for w in lm.words if len(c) == 2 and (*c, w) not in lm.log10_prob
    )
    below = probability(lm, unseen[1:2], unseen[2])
    assert probability(lm, unseen[:2], unseen[2]) == pytest.approx(10 ** lm.log10_backoff[unseen[:2]] * below)


def test_states_forget_what_no_longer_matters():
    lm = estimate(["A B", "A C"], order=3)
    state = lm.start()
    for word in ("C", "NEW", "B"):
        state, _ = lm.step(state, word)
    assert state == ("B",)
    assert lm.step(state, "NEW")[0] == ()


def test_real_order_beats_shuffled_words_and_training_text_beats_new_text():
    text = ["THE CAT SAT ON THE MAT", "THE DOG SAT ON THE LOG", "A CAT RAN ON A LOG"]
    lm = estimate(text, order=3)
    assert lm.perplexity(text) < lm.perplexity(["THE DOG RAN ON A MAT"]) < lm.perplexity(["MAT A ON RAN DOG THE"])


def test_arpa_keeps_the_model_to_the_last_digit_and_is_the_same_text_in_any_order_of_sentences():
    text = babble(100, 10)
    lm = estimate(text, order=3)
    arpa = "".join(lm.arpa_lines())
    assert NgramLM.from_arpa(arpa.splitlines()) == lm == pickle.loads(pickle.dumps(lm))
    assert "".join(estimate(reversed(text), order=3).arpa_lines()) == arpa


FOREIGN = """made by another tool

\\data\\
ngram 1=4
ngram 2=2

\\1-grams:
-0.5 A -0.25
-99 <s> -0.125
-0.75\tB\t-0.5
-1 </s> 0

\\2-grams:
-0.0625 <s> A
-0.3 A B 0

\\end\\
"""


def test_arpa_files_of_others_are_read():
    lm = NgramLM.from_arpa(FOREIGN.splitlines())
    assert (lm.order, lm.words) == (2, ["A", "B"])
    assert lm.score(["A", "B"]) == pytest.approx(-0.0625 - 0.3 + (-0.5 - 1))
    assert lm.score(["B", "A"]) == pytest.approx((-0.125 - 0.75) + (-0.5 - 0.5) + (-0.25 - 1))
    assert lm.score(["NEW"]) == pytest.approx(-0.125 - 100 - 1)  # no <unk> in the file: as KenLM


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (FOREIGN.replace("\\end\\", ""), "cut short"),
        (FOREIGN.replace("ngram 2=2", "ngram 2=3"), "damaged"),
        (FOREIGN.replace("-0.3 A B 0", "-0.3 A"), "line 15"),
        ("not a model", "cut short"),
    ],
)
def test_what_is_not_arpa_is_refused(broken, message):
    with pytest.raises(ArpaError, match=message):
        NgramLM.from_arpa(broken.splitlines())


def test_no_sentences_is_an_error():
    with pytest.raises(CorpusError, match="no sentences"):
        estimate([], order=4)
