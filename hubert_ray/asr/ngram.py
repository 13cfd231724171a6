"""How likely is a sentence? A back-off n-gram model of words: estimated here, read and written as ARPA.

`estimate` is interpolated modified Kneser-Ney (Chen and Goodman 1998) as KenLM's lmplz defines it: counts of types
below the top order, raw counts for n-grams that begin a sentence, three discounts per order, the unigrams interpolated
with a uniform distribution over the words, </s> and <unk>. Nothing is pruned. Counting streams over the sentences and
holds the n-gram types in memory: right for transcripts and millions of words of text; for billions, estimate with lmplz
and decode its ARPA file through `decoder.KenlmFile`.

All scores are log10, as in the file format. A state is the shortest tuple of last words that still decides every later
score, so that decoders can merge histories that share one.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hubert_ray.errors import CorpusError, HubertRayError

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
Ngram = tuple[str, ...]
State = tuple[str, ...]

_NEVER = -99.0  # ARPA's log10 of zero: the "probability" of <s>, which is only ever a context
_MISSING_UNKNOWN = -100.0  # what KenLM gives unknown words where a file has no <unk>
_DECIMALS = 7  # of an estimated log10: short in the file, and the model read back is the model written
_FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # lmplz --discount_fallback


class ArpaError(HubertRayError):
    """A text is not an n-gram model in the ARPA format."""


@dataclass(frozen=True)
class NgramLM:
    """A back-off model. `log10_prob` holds every n-gram of every order, `log10_backoff` the weight of each context."""

    order: int
    log10_prob: dict[Ngram, float]
    log10_backoff: dict[Ngram, float]
    _contexts: frozenset[Ngram] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        extended = {ngram[:-1] for ngram in self.log10_prob}
        weighted = {context for context, weight in self.log10_backoff.items() if weight != 0.0}
        object.__setattr__(self, "_contexts", frozenset(c for c in extended | weighted if len(c) < self.order))

    def __reduce__(self):
        return NgramLM, (self.order, self.log10_prob, self.log10_backoff)

    @property
    def words(self) -> list[str]:
        """The vocabulary in sorted order, without <s>, </s>, <unk>."""
        return sorted(g[0] for g in self.log10_prob if len(g) == 1 and g[0] not in (BEGIN, END, UNKNOWN))

    def start(self) -> State:
        """The state before the first word of a sentence."""
        return self._shorten((BEGIN,))

    def step(self, state: State, word: str) -> tuple[State, float]:
        """The state after `word`, and log10 P(word | state). A word outside the vocabulary is scored as <unk>."""
        if (word,) not in self.log10_prob:
            word = UNKNOWN
        return self._shorten((*state, word)), self._log10(state, word)

    def finish(self, state: State) -> float:
        """log10 P(</s> | state)."""
        return self._log10(state, END)

    def score(self, words: Iterable[str]) -> float:
        """log10 P of a whole sentence, its end included."""
        state, total = self.start(), 0.0
        for word in words:
            state, log10 = self.step(state, word)
            total += log10
        return total + self.finish(state)

    def perplexity(self, sentences: Iterable[str]) -> float:
        """Per word, the end of each sentence counted as a word."""
        total, units = 0.0, 0
        for sentence in sentences:
            words = sentence.split()
            total += self.score(words)
            units += len(words) + 1
        assert units, "perplexity of no sentences"
        return 10.0 ** (-total / units)

    def arpa_lines(self) -> Iterator[str]:
        """The model as lines of an ARPA file, in an order fixed by the n-grams."""
        by_order: dict[int, list[Ngram]] = defaultdict(list)
        for ngram in sorted(self.log10_prob):
            by_order[len(ngram)].append(ngram)
        yield "\\data\\\n"
        for order in range(1, self.order + 1):
            yield f"ngram {order}={len(by_order[order])}\n"
        for order in range(1, self.order + 1):
            yield f"\n\\{order}-grams:\n"
            for ngram in by_order[order]:
                weight = self.log10_backoff.get(ngram)
                tail = "" if weight is None else f"\t{weight!r}"
                yield f"{self.log10_prob[ngram]!r}\t{' '.join(ngram)}{tail}\n"
        yield "\n\\end\\\n"

    @classmethod
    def from_arpa(cls, lines: Iterable[str]) -> NgramLM:
        """Read an ARPA file: an open text file, or `text.splitlines()`."""
        return _read_arpa(lines)

    def _log10(self, state: State, word: str) -> float:
        weight = 0.0
        for first in range(len(state) + 1):
            context = state[first:]
            found = self.log10_prob.get((*context, word))
            if found is not None:
                return weight + found
            weight += self.log10_backoff.get(context, 0.0)
        return weight + _MISSING_UNKNOWN

    def _shorten(self, history: State) -> State:
        for first in range(len(history)):
            if history[first:] in self._contexts:
                return history[first:]
        return ()


# --- estimation -------------------------------------------------------------------------------------------------------


def estimate(sentences: Iterable[str], order: int) -> NgramLM:
    """The model of `order` words of a stream of normalised sentences (words parted by spaces)."""
    assert order >= 1, f"order {order}"
    counts = _adjusted_counts(sentences, order)
    probs: dict[Ngram, float] = {}
    weights: dict[Ngram, float] = {}
    # Below the unigrams: uniform over the words, </s> and <unk>.
    counts[1][(UNKNOWN,)] = 0
    lower: dict[Ngram, float] = {(): 1.0 / len(counts[1])}
    for length in range(1, order + 1):
        level, context_weight = _discounted(counts[length], lower)
        probs |= level
        weights |= context_weight
        lower = level
    log10_prob = {ngram: round(math.log10(p), _DECIMALS) for ngram, p in probs.items()}
    log10_prob[BEGIN,] = _NEVER
    log10_backoff = {context: round(math.log10(w), _DECIMALS) for context, w in weights.items() if context}
    return NgramLM(order, log10_prob, log10_backoff)


def _adjusted_counts(sentences: Iterable[str], order: int) -> dict[int, dict[Ngram, int]]:
    """Per length: raw counts at the top and of n-grams that begin a sentence, else of distinct words before."""
    counts: dict[int, Counter[Ngram]] = {length: Counter() for length in range(1, order + 1)}
    for sentence in sentences:
        padded = (BEGIN, *sentence.split(), END)
        reserved = {BEGIN, END, UNKNOWN}.intersection(padded[1:-1])
        assert not reserved, f"{sorted(reserved)} inside a sentence: normalise the text first (asr.letters.normalise)"
        counts[order].update(padded[i : i + order] for i in range(len(padded) - order + 1))
        for length in range(1, min(order - 1, len(padded)) + 1):
            counts[length][padded[:length]] += 1
    if not any(counts.values()):
        raise CorpusError("no sentences to estimate a language model from; expected one or more transcripts")
    for length in range(order, 1, -1):
        for ngram in counts[length]:
            counts[length - 1][ngram[1:]] += 1
    counts[1].pop((BEGIN,), None)  # <s> is a context, never predicted
    # Sorted, so that sums of floats below do not depend on the order of the sentences.
    return {length: dict(sorted(level.items())) for length, level in counts.items()}


def _discounted(counts: dict[Ngram, int], lower: dict[Ngram, float]) -> tuple[dict[Ngram, float], dict[Ngram, float]]:
    """One order's interpolated probabilities, and the weight with which each context falls back on `lower`."""
    discounts = _discounts(counts)
    total: dict[Ngram, int] = defaultdict(int)
    kept_back: dict[Ngram, float] = defaultdict(float)
    for ngram, count in counts.items():
        total[ngram[:-1]] += count
        kept_back[ngram[:-1]] += discounts[min(count, 3)]
    weight = {context: kept_back[context] / total[context] for context in total}
    probs = {}
    for ngram, count in counts.items():
        context = ngram[:-1]
        own = (count - discounts[min(count, 3)]) / total[context]
        probs[ngram] = own + weight[context] * (lower[ngram[1:]] if context else lower[()])
    return probs, weight


def _discounts(counts: dict[Ngram, int]) -> tuple[float, float, float, float]:
    """What is taken from counts of 0, 1, 2, 3 and more; fixed values where the data are too few to tell."""
    of = Counter(counts.values())
    n1, n2, n3, n4 = (of[i] for i in (1, 2, 3, 4))
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        estimated = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if all(0 < discount <= i for i, discount in enumerate(estimated, 1)):
            return (0.0, *estimated)
    return (0.0, *_FALLBACK_DISCOUNTS)


# --- ARPA -------------------------------------------------------------------------------------------------------------


def _read_arpa(lines: Iterable[str]) -> NgramLM:
    promised: dict[int, int] = {}
    log10_prob: dict[Ngram, float] = {}
    log10_backoff: dict[Ngram, float] = {}
    section = None  # None before \data\, 0 in it, then the length of the n-grams listed
    for number, raw in enumerate(lines, 1):
        line = raw.strip()
        if not line:
            continue
        if line == "\\end\\":
            return _checked(promised, log10_prob, log10_backoff)
        if line == "\\data\\":
            section = 0
        elif section is not None and line.startswith("\\") and line.endswith("-grams:"):
            section = int(line[1 : -len("-grams:")])
        elif section == 0:
            order, count = line.removeprefix("ngram").split("=")
            promised[int(order)] = int(count)
        elif section:
            fields = line.split()
            if len(fields) not in (section + 1, section + 2):
                raise ArpaError(f"line {number} is {line!r}; expected log10 probability, {section} words, [back-off]")
            ngram = tuple(fields[1 : section + 1])
            log10_prob[ngram] = float(fields[0])
            if len(fields) == section + 2:
                log10_backoff[ngram] = float(fields[-1])
    raise ArpaError(
        "found no \\end\\ line; expected an ARPA text file (\\data\\, \\1-grams:, ..., \\end\\); "
        "is the file cut short, or KenLM's binary format? The latter goes to decoder.KenlmFile"
    )


def _checked(promised: dict[int, int], log10_prob: dict[Ngram, float], log10_backoff: dict[Ngram, float]) -> NgramLM:
    found = Counter(map(len, log10_prob))
    if not promised or any(found[order] != count for order, count in promised.items()):
        raise ArpaError(f"found n-grams {dict(found)}; the header says {promised}; the file is damaged, fetch it again")
    order = max(promised)
    # Weights of the longest n-grams, which some tools write as 0, are never used.
    return NgramLM(order, log10_prob, {context: w for context, w in log10_backoff.items() if len(context) < order})
