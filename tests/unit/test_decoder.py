"""Does the beam search find the best word sequence, by the score that the paper writes, with either language model?"""

import itertools
import math
import pickle
import random
from functools import cache

import pytest
import torch

from hubert_ray.asr import letters
from hubert_ray.asr.decoder import BeamDecoder, DecodeError, KenlmFile, greedy, kenlm_available
from hubert_ray.asr.ngram import NgramLM, estimate
from hubert_ray.config.recipe import Decode

EXHAUSTIVE = Decode(beam=100_000, beam_threshold=1e9)
WORDS = ["A", "AA", "AB", "B", "BA"]
LM = estimate(["A B", "A AB", "BA A", "AA", "B BA B", "A B A"], order=3)
WEIGHTS = [(0.0, 0.0), (1.0, 0.0), (0.7, 1.5), (2.0, -1.0)]


def spoken(text: str, seed: int = 0, sharpness: float = 6.0, frames_per_symbol: int = 3) -> torch.Tensor:
    """Noisy log-probabilities (T, V) in which every letter of `text` lasts a few frames."""
    noise = torch.Generator().manual_seed(seed)
    path = [i for letter in letters.encode(text) for i in [letter] * (frames_per_symbol - 1) + [letters.BLANK]]
    logits_TV = torch.randn(len(path), len(letters.ALPHABET), generator=noise)
    logits_TV[torch.arange(len(path)), path] += sharpness
    return logits_TV.log_softmax(-1)


def test_greedy():
    assert greedy(spoken("HELLO WORLD")) == "HELLO WORLD"
    assert greedy(torch.zeros(0, 29)) == ""


FRAMES = 6
SYMBOLS = [letters.BLANK, letters.SEPARATOR, *letters.encode("AB")[:2]]


@cache
def every_path() -> list[tuple[tuple[int, ...], str]]:
    """The paths through A, B, | and blank that the lexicon spells and that close their last word, with their texts."""
    spelled = []
    for path in itertools.product(SYMBOLS, repeat=FRAMES):
        written = [number for number, _ in itertools.groupby(path) if number != letters.BLANK]
        text = letters.decode(path)
        if (not written or written[-1] == letters.SEPARATOR) and set(text.split()) <= set(WORDS):
            spelled.append((path, text))
    return spelled


def by_brute_force(log_probs_TV: torch.Tensor, lm_weight: float, word_score: float) -> tuple[str, float]:
    """The best text over every path, by the formula as it is written."""
    best_of: dict[str, float] = {}
    emissions = log_probs_TV.tolist()
    for path, text in every_path():
        score = sum(emissions[frame][symbol] for frame, symbol in enumerate(path))
        best_of[text] = max(best_of.get(text, -math.inf), score)
    scored = {
        text: score + lm_weight * math.log(10) * LM.score(text.split()) + word_score * len(text.split())
        for text, score in best_of.items()
    }
    return max(scored.items(), key=lambda item: item[1])


@pytest.mark.parametrize("seed", range(4))
def test_the_best_hypothesis_is_the_one_of_a_search_through_every_path(seed, language_model):
    log_probs_TV = torch.full((FRAMES, len(letters.ALPHABET)), -math.inf)
    noise = torch.Generator().manual_seed(seed)
    log_probs_TV[:, SYMBOLS] = (2 * torch.randn(FRAMES, len(SYMBOLS), generator=noise)).log_softmax(-1)
    decoder = BeamDecoder(WORDS, language_model, EXHAUSTIVE)
    for weights in WEIGHTS:
        text, score = by_brute_force(log_probs_TV, *weights)
        found = decoder.best(log_probs_TV, *weights)
        assert found.text == text
        assert found.score == pytest.approx(score, abs=1e-4)
        parts = found.ln_ctc + weights[0] * found.ln_lm + weights[1] * len(text.split())
        assert parts == pytest.approx(score, abs=1e-4)


@pytest.fixture(params=["NgramLM", "KenLM"])
def language_model(request, tmp_path) -> NgramLM | KenlmFile:
    return LM if request.param == "NgramLM" else kenlm_file(LM, tmp_path)


def kenlm_file(lm: NgramLM, folder) -> KenlmFile:
    if not kenlm_available():
        pytest.skip("this flashlight-text was built without KenLM")
    path = folder / "lm.arpa"
    path.write_text("".join(lm.arpa_lines()))
    return KenlmFile(str(path))


def some_language(words: int, seed: int = 0) -> tuple[list[str], NgramLM, list[str]]:
    """Made-up words, a 4-gram model of sentences of them, and sentences to recognise."""
    draw = random.Random(seed)
    vocabulary = sorted({"".join(draw.choices("ABCDEST'", k=draw.randint(2, 6))) for _ in range(words)})
    vocabulary = [word for word in vocabulary if word.strip("'")]
    follow = {word: draw.choices(vocabulary, k=3) for word in vocabulary}

    def sentence() -> str:
        said = [draw.choice(vocabulary)]
        while len(said) < 5:
            said.append(draw.choice(follow[said[-1]]))
        return " ".join(said)

    return vocabulary, estimate((sentence() for _ in range(500)), order=4), [sentence() for _ in range(6)]


def test_both_language_models_give_the_same_texts_and_scores(tmp_path):
    vocabulary, lm, sentences = some_language(60)
    ours = BeamDecoder([*vocabulary, "ZZZ"], lm, Decode(beam=300))
    theirs = BeamDecoder([*vocabulary, "ZZZ"], kenlm_file(lm, tmp_path), Decode(beam=300))
    for seed, sentence in enumerate(sentences[:3]):
        log_probs_TV = spoken(sentence, seed, sharpness=4.0)
        for weights in WEIGHTS:
            a, b = ours.best(log_probs_TV, *weights), theirs.best(log_probs_TV, *weights)
            assert a.text == b.text
            assert (a.score, a.ln_lm) == pytest.approx((b.score, b.ln_lm), abs=1e-3)
            said = lm.score(a.text.split()) * math.log(10)
            assert a.ln_lm == pytest.approx(said, abs=1e-3), "ln P_LM is the natural log"


def test_the_language_model_repairs_what_greedy_gets_wrong():
    vocabulary, lm, sentences = some_language(60)
    decoder = BeamDecoder(vocabulary, lm, Decode(beam=100))
    heard = [spoken(sentence, seed, sharpness=3.0) for seed, sentence in enumerate(sentences)]
    assert sum(greedy(x) == s for x, s in zip(heard, sentences, strict=True)) == 0
    assert sum(decoder.decode(x, 1.0, 0.0) == s for x, s in zip(heard, sentences, strict=True)) >= 5


def test_only_words_of_the_lexicon_come_out():
    decoder = BeamDecoder(["CAT", "DOG"], estimate(["CAT DOG COW"], order=2), Decode(beam=50))
    assert set(decoder.decode(spoken("CAT COW DOG"), 0.5, 0.0).split()) <= {"CAT", "DOG"}


def test_a_word_score_buys_words():
    decoder = BeamDecoder(["A", "AT", "CAT", "T"], estimate(["CAT", "A AT", "T"], order=2), Decode(beam=500))
    log_probs_TV = spoken("CAT AT", sharpness=1.0)
    few, many = (len(decoder.decode(log_probs_TV, 0.2, score).split()) for score in (-8.0, 8.0))
    assert few < many


def test_decoding_again_or_in_another_process_gives_the_same_and_other_weights_do_not_disturb(language_model):
    decoder = BeamDecoder(reversed(WORDS), language_model, Decode(beam=20))
    log_probs_TV = spoken("AB BA A B", sharpness=1.0)
    first = decoder.best(log_probs_TV, 1.0, 0.5)
    decoder.decode(log_probs_TV, 3.0, -1.0)
    decoder.decode(spoken("AA"), 1.0, 0.5)
    assert decoder.best(log_probs_TV, 1.0, 0.5) == first
    assert pickle.loads(pickle.dumps(decoder)).best(log_probs_TV, 1.0, 0.5) == first
    assert decoder.best(log_probs_TV.half().repeat_interleave(2, 1)[:, ::2], 1.0, 0.5).text == first.text


def test_exact_ties_are_broken_alike_whatever_the_memory_layout():
    """Coarse log-probabilities, in which many paths have the same sum; decoders built anew among other objects."""
    vocabulary, lm, sentences = some_language(60)
    coarse = [(spoken(s, i, sharpness=1.0) * 2).round() / 2 for i, s in enumerate(sentences)] + [torch.zeros(40, 29)]
    litter, answers = [], set()
    for attempt in range(4):
        litter.append([torch.zeros(7 * i + attempt) for i in range(300)])
        shuffled = random.Random(attempt).sample(vocabulary * 2, 2 * len(vocabulary))
        decoder = BeamDecoder(shuffled, lm, Decode(beam=15))
        if attempt % 2:
            decoder.decode(spoken(sentences[attempt]), 1.0, 3.0)
        answers.add(tuple(decoder.best(x, 1.0, 3.0) for x in coarse))
        litter[-1] = litter[-1][::2]
    assert len(answers) == 1


def test_memory_of_scores_is_bounded(monkeypatch):
    monkeypatch.setattr("hubert_ray.asr.decoder._MEMO_LIMIT", 5)
    decoder = BeamDecoder(WORDS, LM, Decode(beam=20))
    texts = ["AB BA A B", "A B", "AA", "BA A"]
    assert [decoder.decode(spoken(text), 0.3, 1.0) for text in texts] == texts


def test_no_frames_is_no_words(language_model):
    assert BeamDecoder(WORDS, language_model, EXHAUSTIVE).decode(torch.zeros(0, 29), 1.0, 0.0) == ""


def test_what_cannot_be_decoded_is_refused(tmp_path):
    decoder = BeamDecoder(WORDS, LM, EXHAUSTIVE)
    with pytest.raises(DecodeError, match="another alphabet"):
        decoder.decode(torch.zeros(5, 32), 1.0, 0.0)
    with pytest.raises(DecodeError, match="diverge"):
        decoder.decode(torch.full((5, 29), math.nan), 1.0, 0.0)
    with pytest.raises(DecodeError, match="empty lexicon"):
        BeamDecoder([], LM, EXHAUSTIVE)
    with pytest.raises(DecodeError, match="one word"):
        BeamDecoder(["A B"], LM, EXHAUSTIVE)
    with pytest.raises(letters.UnspellableTextError):
        BeamDecoder(["lower"], LM, EXHAUSTIVE)
    if kenlm_available():
        with pytest.raises(DecodeError, match="order 2 or more"):
            BeamDecoder(WORDS, KenlmFile(str(tmp_path / "absent.arpa")), EXHAUSTIVE)
