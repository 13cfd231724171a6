"""Which words do the CTC log-probabilities spell? Greedy, or a beam search with a lexicon and an n-gram model.

The beam search maximises (HuBERT (Hsu et al. 2021) IV-D, eq. 4)

    ln p_CTC(letters | audio)  +  lm_weight * ln P_LM(words, </s>)  +  word_score * number of words

through flashlight's LexiconDecoder, as fairseq's `flashlight_decoder.py` does: p_CTC is the best alignment rather than
their sum, every word comes from the lexicon (unknown words score -inf), and a word counts once its closing `|` is
emitted. Hypotheses that end inside a word lose to any that do not; if the beam holds no other, their unfinished letters
are dropped.

**The weight is for the NATURAL logarithm of P_LM, as the paper writes it.** n-gram files and flashlight's KenLM score
in log10, so fairseq's, wav2vec 2.0's and torchaudio's n-gram weights are ln(10) = 2.303 times ours: their 2.46 is
`lm_weight` 1.07 here (and fairseq's default 2 is 0.87). Weights of Transformer models and all word scores are the same.

Two models, equal scores: `NgramLM` (Python) and `KenlmFile` (C++, inside the flashlight wheel). The search differs in
one thing: NgramLM merges hypotheses that end in the same n-gram state, KenLM never does, so it needs a wider beam.
Results do not depend on batching or on which worker decodes. flashlight breaks ties by memory address, and ties are
common in half-precision log-probabilities; so the search runs on log-probabilities with a fixed dither of 1e-4, and the
scores reported are those of the found path without it. Shapes: T frames of 20 ms, V = 29 symbols.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from flashlight.lib.text.decoder import (
    LM,
    CriterionType,
    LexiconDecoder,
    LexiconDecoderOptions,
    LMState,
    SmearingMode,
    Trie,
)
from flashlight.lib.text.dictionary import Dictionary

from hubert_ray.asr import letters
from hubert_ray.asr.ngram import UNKNOWN, NgramLM, State
from hubert_ray.config.recipe import Decode
from hubert_ray.errors import HubertRayError

_LN_10 = math.log(10.0)
_DITHER = 1e-4  # nats per frame at most: far above float32's rounding, far below what tells words apart
_MEMO_LIMIT = 2_000_000  # word scores remembered by one decoder, about 0.3 GB


class DecodeError(HubertRayError):
    """The log-probabilities, the lexicon or the language model cannot be decoded with."""


@dataclass(frozen=True)
class KenlmFile:
    """An n-gram model of order 2 or more that KenLM reads where the decoder runs: an ARPA or a KenLM binary file."""

    path: str


@dataclass(frozen=True)
class Hypothesis:
    """A decoded text. `score` is the sum that was maximised; `ln_ctc` and `ln_lm` are its unweighted parts."""

    text: str
    score: float
    ln_ctc: float
    ln_lm: float


def greedy(log_probs_TV: torch.Tensor) -> str:
    """The most likely symbol of every frame, collapsed; no language model."""
    return letters.decode(_checked(log_probs_TV).argmax(dim=-1).tolist())


@cache
def kenlm_available() -> bool:
    """Whether flashlight's KenLM loads here. Ask once, on the driver, so that all workers use one model."""
    try:
        import flashlight.lib.text.decoder.kenlm  # noqa: F401
    except ImportError:
        return False
    return True


class BeamDecoder:
    """Beam search over the words of a lexicon. Pickles as its arguments; other weights reuse its lexicon and memory."""

    def __init__(self, words: Iterable[str], lm: NgramLM | KenlmFile, settings: Decode):
        self.words = sorted(set(words))
        self.lm = lm
        self.settings = settings
        if not self.words:
            raise DecodeError("found an empty lexicon; expected the words of the training transcripts")
        self._scorer = _NgramScorer(lm, self.words) if isinstance(lm, NgramLM) else _kenlm_scorer(lm, self.words)
        self._trie = _letter_trie(self.words, self._scorer)
        self._search_of: dict[tuple[float, float], LexiconDecoder] = {}

    def __reduce__(self):
        return BeamDecoder, (self.words, self.lm, self.settings)

    def decode(self, log_probs_TV: torch.Tensor, lm_weight: float, word_score: float) -> str:
        """The best text of one utterance."""
        return self.best(log_probs_TV, lm_weight, word_score).text

    def best(self, log_probs_TV: torch.Tensor, lm_weight: float, word_score: float) -> Hypothesis:
        """The best text of one utterance with its scores."""
        emissions_TV = _checked(log_probs_TV)
        frames, symbols = emissions_TV.shape
        dithered_TV = emissions_TV + _dither(frames, symbols)
        found = self._search(lm_weight, word_score).decode(dithered_TV.data_ptr(), frames, symbols)[0]
        spoken = [self.words[word_id] for word_id in found.words if word_id >= 0]
        path = found.tokens[1 : frames + 1]  # between the start and the end, which have no frame
        ln_ctc = float(emissions_TV.double()[torch.arange(frames), path].sum())
        ln_lm = found.lmScore * _LN_10
        return Hypothesis(" ".join(spoken), ln_ctc + lm_weight * ln_lm + word_score * len(spoken), ln_ctc, ln_lm)

    def _search(self, lm_weight: float, word_score: float) -> LexiconDecoder:
        key = (lm_weight, word_score)
        if key not in self._search_of:
            options = LexiconDecoderOptions(
                beam_size=self.settings.beam,
                beam_size_token=len(letters.ALPHABET),
                beam_threshold=self.settings.beam_threshold,
                lm_weight=lm_weight * _LN_10,  # both models score in log10
                word_score=word_score,
                unk_score=-math.inf,
                sil_score=0.0,
                log_add=False,
                criterion_type=CriterionType.CTC,
            )
            self._search_of[key] = LexiconDecoder(
                options, self._trie, self._scorer, letters.SEPARATOR, letters.BLANK, len(self.words), [], False
            )
        return self._search_of[key]


class _State(LMState):
    """flashlight compares states by identity: one object per n-gram state, one for a sentence end there."""

    def __init__(self, ngram_state: State):
        super().__init__()
        self.ngram_state = ngram_state
        self.scored: dict[int, tuple[_State, float]] = {}
        self.finished: tuple[LMState, float] | None = None


class _NgramScorer(LM):
    """NgramLM as flashlight calls it, once per word end in the beam: every answer is remembered across utterances."""

    def __init__(self, lm: NgramLM, words: list[str]):
        super().__init__()
        self._lm = lm
        self._words = words
        self._state_of: dict[State, _State] = {}
        self._remembered = 0

    def start(self, start_with_nothing: bool) -> _State:
        if self._remembered > _MEMO_LIMIT:
            self._state_of.clear()
            self._remembered = 0
        return self._state(() if start_with_nothing else self._lm.start())

    def score(self, state: _State, word_id: int) -> tuple[_State, float]:
        found = state.scored.get(word_id)
        if found is None:
            next_state, log10 = self._lm.step(state.ngram_state, self._words[word_id])
            found = state.scored[word_id] = (self._state(next_state), log10)
            self._remembered += 1
        return found

    def finish(self, state: _State) -> tuple[LMState, float]:
        if state.finished is None:
            state.finished = (LMState(), self._lm.finish(state.ngram_state))
        return state.finished

    def _state(self, ngram_state: State) -> _State:
        found = self._state_of.get(ngram_state)
        if found is None:
            found = self._state_of[ngram_state] = _State(ngram_state)
        return found


def _kenlm_scorer(file: KenlmFile, words: list[str]) -> LM:
    if not kenlm_available():
        raise DecodeError(
            f"{file} needs KenLM, which this build of flashlight-text lacks; expected the wheel of PyPI, which has it "
            "(a build of your own needs USE_KENLM=1); or decode with asr.ngram.NgramLM.from_arpa"
        )
    from flashlight.lib.text.decoder.kenlm import KenLM

    dictionary = Dictionary()
    for word_id, word in enumerate((*words, UNKNOWN)):
        dictionary.add_entry(word, word_id)
    try:
        return KenLM(file.path, dictionary)
    except RuntimeError as error:
        raise DecodeError(
            f"KenLM cannot read {file.path}; expected an ARPA or KenLM binary file of order 2 or more on a disk of "
            f"this machine; KenLM says: {error}"
        ) from error


def _letter_trie(words: list[str], scorer: LM) -> Trie:
    """Words by their letters; each node knows the best unigram below, added ahead of the word end."""
    trie = Trie(len(letters.ALPHABET), letters.SEPARATOR)
    start = scorer.start(False)
    for word_id, word in enumerate(words):
        if len(word.split()) != 1:
            raise DecodeError(f"found {word!r} in the lexicon; expected one word without spaces")
        _, log10 = scorer.score(start, word_id)
        trie.insert(letters.encode(word), word_id, log10)
    trie.smear(SmearingMode.MAX)
    return trie


def _dither(frames: int, symbols: int) -> torch.Tensor:
    """The same small numbers for every utterance of this length; random, so that no two paths have the same sum."""
    return _DITHER * torch.rand(frames, symbols, generator=torch.Generator().manual_seed(0))


def _checked(log_probs_TV: torch.Tensor) -> torch.Tensor:
    """As flashlight reads it: contiguous float32 on the CPU, one column per symbol, no NaN."""
    if log_probs_TV.ndim != 2 or log_probs_TV.shape[1] != len(letters.ALPHABET):
        raise DecodeError(
            f"found log-probabilities of shape {tuple(log_probs_TV.shape)}; expected (frames, {len(letters.ALPHABET)}) "
            "of one utterance without padding; is this model fine-tuned with another alphabet?"
        )
    log_probs_TV = log_probs_TV.detach().to("cpu", torch.float32).contiguous()
    if bool(log_probs_TV.isnan().any()):
        raise DecodeError("found NaN among the log-probabilities; expected numbers; did fine-tuning diverge?")
    return log_probs_TV
