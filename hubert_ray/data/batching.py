"""Which crops make up step N? A pure function of (lengths, settings, step), the same for every number of workers.

An epoch shuffles the utterances, cuts each to the longest crop length that it fills, and deals crops of one length into
micro-batches; micro-batches are shuffled and dealt into steps. Workers share out the micro-batches of a step, so a step
holds the same audio whoever computes it, and any step can be rebuilt from its number alone: that is the whole of resume.
There is no padding, and crops start on multiples of 320 samples, so labels always fall on frames exactly.

No list of utterances is ever made, shuffled or not. Crops of one length stand in a line, in the order of their rows; how many
of them lie before every 1024th row is counted once, in a pass over the lengths, and the k-th of a line is found by counting
on from there. Shuffles are keyed permutations of places in the lines (data/shuffle.py). So 200 million utterances take 20 MB,
an epoch begins at no cost, and its last step is as near as its first.

The parts of a mix may be repeated within an epoch, so that their shares of it are not those of their hours (`repeats`). An
utterance of a part that is repeated r times comes floor(r) or floor(r) + 1 times; which ones come more often differs by epoch.

Differs from fairseq on purpose: it cuts each batch to its shortest member, wherever that falls; here lengths come from a
fixed set, so compiled graphs and mask counts are few.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hubert_ray.config.recipe import Pretrain
from hubert_ray.data.frames import SAMPLE_RATE, STRIDE, frames_of, samples_of
from hubert_ray.data.shuffle import Shuffle
from hubert_ray.errors import TrainingError

_BLOCK = 1024  # rows between two counts
_ROWS_AT_ONCE = 1024 * _BLOCK
_shuffle = lru_cache(maxsize=256)(Shuffle)  # those of an epoch are asked again and again


@dataclass(frozen=True)
class MicroBatch:
    """Crops of one length: row r is `samples_of(frames)` samples of utterance `rows[r]` from `starts[r]` on."""

    step: int
    index: int  # position within the step; seeds masks and dropout
    rows: np.ndarray  # (B,) rows of the index
    starts: np.ndarray  # (B,) samples, multiples of 320
    frames: int

    @property
    def seconds(self) -> float:
        """Audio in this micro-batch."""
        return len(self.rows) * samples_of(self.frames) / SAMPLE_RATE


def crop_frames(settings: Pretrain) -> np.ndarray:
    """The crop lengths in frames, ascending, evenly spaced in logarithm between the two bounds."""
    shortest = frames_of(round(settings.min_crop_seconds * SAMPLE_RATE))
    longest = frames_of(round(settings.max_crop_seconds * SAMPLE_RATE))
    return np.unique(np.geomspace(shortest, longest, settings.crop_lengths).round().astype(np.int64))


class _Lines:
    """The utterances of each crop length (C of them) in the order of their rows: counting, and finding the k-th."""

    def __init__(self, samples: np.ndarray, crop_samples: np.ndarray):
        self._samples = samples
        self._least = crop_samples.astype(
            samples.dtype
        )  # an utterance is in the line of the longest crop that it fills
        self._most = np.append(self._least[1:] - 1, np.iinfo(samples.dtype).max).astype(samples.dtype)
        counts = [np.zeros((len(crop_samples), 1), np.int64)]
        for start in range(0, len(samples), _ROWS_AT_ONCE):
            counts.append(self._counts(samples[start : start + _ROWS_AT_ONCE]))
        self._before = np.cumsum(np.concatenate(counts, axis=1), axis=1)  # (C, blocks + 1)

    def _counts(self, samples: np.ndarray) -> np.ndarray:
        """How many of each line are in each block of some rows, (C, blocks)."""
        starts = np.arange(0, len(samples), _BLOCK)
        filled = [np.add.reduceat((samples >= least).view(np.uint8), starts, dtype=np.uint16) for least in self._least]
        return -np.diff(np.stack(filled).astype(np.int64), axis=0, append=0)

    def before(self, row: int) -> np.ndarray:
        """How many of each line lie before a row, (C,)."""
        block, rest = divmod(row, _BLOCK)
        more = self._counts(self._samples[row - rest : row])[:, 0] if rest else 0
        return self._before[:, block] + more

    def find(self, line: int, places: np.ndarray) -> np.ndarray:
        """Rows of the utterances that stand at some places (B,) of a line."""
        blocks = np.searchsorted(self._before[line], places, side="right") - 1
        rows = blocks[:, None] * _BLOCK + np.arange(_BLOCK)
        samples = self._samples[np.minimum(rows, len(self._samples) - 1)]
        within = (samples >= self._least[line]) & (samples <= self._most[line]) & (rows < len(self._samples))
        wanted = places - self._before[line, blocks] + 1
        return blocks * _BLOCK + (np.cumsum(within, axis=1, dtype=np.int32) == wanted[:, None]).argmax(axis=1)


def repeats(seconds: Mapping[str, float], languages: Mapping[str, str], settings: Pretrain) -> dict[str, float]:
    """How often an epoch sees the utterances of each part of a mix, from 1 on; the least repeated part is seen once.

    `seconds`: audio of each part; `languages`: those of the parts that name one, the others make up one together. A language of
    h hours has a share of the epoch proportional to h ** language_alpha, and within it each of its parts by h ** dataset_alpha;
    mHuBERT-147 (Zanon Boito et al. 2024) has 0.7 and 0.9.
    """
    heard = {part: length for part, length in seconds.items() if length}
    whole: dict[str, float] = {}  # seconds of a language
    powers: dict[str, float] = {}  # sum over its parts, each to the power
    for part, length in heard.items():
        language = languages.get(part, "")
        whole[language] = whole.get(language, 0.0) + length
        powers[language] = powers.get(language, 0.0) + length**settings.dataset_alpha
    density = {}  # share of the epoch by second
    for part, length in heard.items():
        language = languages.get(part, "")
        share = whole[language] ** settings.language_alpha * length**settings.dataset_alpha / powers[language]
        density[part] = share / length
    least = min(density.values(), default=1.0)
    return {part: density.get(part, least) / least for part in seconds}


class BatchPlan:
    """The plan over utterances of `samples` (N,) 16 kHz samples each, which may be mapped from disk.

    `parts` are the rows of each part of a mix, `languages` those of the parts that name one. Raises TrainingError where no
    utterance is as long as the shortest crop.
    """

    def __init__(
        self,
        samples: np.ndarray,
        settings: Pretrain,
        parts: Mapping[str, slice] | None = None,
        languages: Mapping[str, str] | None = None,
    ):
        self._samples = samples
        self._seed = settings.seed
        self._frames = crop_frames(settings)
        crop_samples = (self._frames - 1) * STRIDE + samples_of(1)
        self._lines = _Lines(samples, crop_samples)
        rows = parts or {"": slice(0, len(samples))}
        self._first_PC = np.stack([self._lines.before(chosen.start) for chosen in rows.values()])
        self._counts_PC = np.stack([self._lines.before(chosen.stop) for chosen in rows.values()]) - self._first_PC
        self.utterances = int(self._counts_PC.sum())
        if not self.utterances:
            raise TrainingError(
                f"none of {len(samples)} utterances is as long as the shortest crop, "
                f"{settings.min_crop_seconds:g} s; lower pretrain.min_crop_seconds"
            )
        seconds = dict(zip(rows, (self._counts_PC @ crop_samples / SAMPLE_RATE).tolist(), strict=True))
        self.repeats = repeats(seconds, languages or {}, settings)
        times_P = np.array([self.repeats[part] for part in rows])
        self._ends_PC = np.cumsum(np.rint(times_P[:, None] * self._counts_PC).astype(np.int64), axis=0)
        per_micro = settings.micro_batch_seconds * SAMPLE_RATE // crop_samples
        self._rows = np.maximum(per_micro, 1).astype(np.int64)
        self._micro_ends = np.cumsum(-(-self._ends_PC[-1] // self._rows))
        self.micro_batches_per_step = max(1, round(settings.batch_seconds / settings.micro_batch_seconds))
        self.steps_per_epoch = -(-int(self._micro_ends[-1]) // self.micro_batches_per_step)

    def step(self, step: int) -> tuple[MicroBatch, ...]:
        """The micro-batches of a step (0-based). The last ones of an epoch are filled up from the epoch's beginning."""
        return tuple(self.micro_batch(step, index) for index in range(self.micro_batches_per_step))

    def shapes(self, step: int) -> list[tuple[int, int]]:
        """(crops, frames of each) of the micro-batches of a step."""
        lines = self._dealt(step, np.arange(self.micro_batches_per_step))[0]
        return list(zip(self._rows[lines].tolist(), self._frames[lines].tolist(), strict=True))

    def micro_batch(self, step: int, index: int) -> MicroBatch:
        """One micro-batch of a step."""
        lines, numbers = self._dealt(step, np.array([index]))
        line = int(lines[0])
        rows = self._drawn(
            step // self.steps_per_epoch, line, numbers[0] * self._rows[line] + np.arange(self._rows[line])
        )
        frames = int(self._frames[line])
        rng = np.random.Generator(np.random.Philox(key=[self._seed, step], counter=[index, 0, 0, 1]))
        slack = (self._samples[rows].astype(np.int64) - samples_of(frames)) // STRIDE
        return MicroBatch(step, index, rows, rng.integers(0, slack + 1) * STRIDE, frames)

    def _dealt(self, step: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which line each micro-batch is of, and its number within the line."""
        epoch, within = divmod(step, self.steps_per_epoch)
        slots = (indices + within * self.micro_batches_per_step) % self._micro_ends[-1]
        dealt = _shuffle(int(self._micro_ends[-1]), self._seed, epoch)(slots)
        lines = np.searchsorted(self._micro_ends, dealt, side="right")
        return lines, dealt - np.append(0, self._micro_ends)[lines]

    def _drawn(self, epoch: int, line: int, places: np.ndarray) -> np.ndarray:
        """Rows at some places (B,) of an epoch's shuffled line; a line's last micro-batch is filled up from its beginning."""
        ends_P, counts_P = self._ends_PC[:, line], self._counts_PC[:, line]
        drawn = _shuffle(int(ends_P[-1]), self._seed, epoch, line)(places % ends_P[-1])
        parts = np.searchsorted(ends_P, drawn, side="right")
        within = drawn - np.append(0, ends_P)[parts]
        for part in np.unique(parts):
            of = parts == part
            of_part = _shuffle(int(counts_P[part]), self._seed, epoch, line, int(part))
            within[of] = of_part(within[of] % counts_P[part])
        return self._lines.find(line, self._first_PC[parts, line] + within)


@dataclass(frozen=True)
class PaddedBatch:
    """Whole utterances of similar length, to be padded together."""

    step: int
    index: int
    rows: np.ndarray  # (B,)


class PaddedPlan:
    """The plan of CTC training: whole utterances, padded, every one once an epoch; a pure function of the step as above.

    Utterances are ordered by length with some jitter per epoch and cut where `micro_batch_seconds` of padded audio are
    full; the cuts come from the lengths alone, so every epoch has as many steps.
    """

    JITTER = 0.2  # share of its length by which an utterance may move in the order

    def __init__(self, samples: np.ndarray, batch_seconds: float, micro_batch_seconds: float, seed: int):
        self._samples = np.asarray(samples, dtype=np.float64)
        self._seed = seed
        if not len(self._samples):
            raise TrainingError("no transcribed utterance to fine-tune on: the train split of the manifest has no text")
        lengths = np.sort(self._samples)
        budget, first = micro_batch_seconds * SAMPLE_RATE, 0
        self._cuts = [0]
        for position, length in enumerate(lengths):
            if position > first and (position - first + 1) * length > budget:
                self._cuts.append(position)
                first = position
        self._cuts.append(len(lengths))
        self.micro_batches_per_step = max(1, round(batch_seconds / micro_batch_seconds))
        self.steps_per_epoch = -(-(len(self._cuts) - 1) // self.micro_batches_per_step)

    def step(self, step: int) -> tuple[PaddedBatch, ...]:
        """The micro-batches of a step (0-based)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        rng = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        order = np.argsort(self._samples * (1 + self.JITTER * rng.random(len(self._samples))), kind="stable")
        deal = rng.permutation(len(self._cuts) - 1)
        slots = np.arange(self.micro_batches_per_step) + within * self.micro_batches_per_step
        chosen = deal[slots % len(deal)]
        return tuple(
            PaddedBatch(step, index, order[self._cuts[number] : self._cuts[number + 1]])
            for index, number in enumerate(chosen)
        )
