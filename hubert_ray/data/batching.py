"""Which crops make up step N? A pure function of (lengths, settings, step), the same for every number of workers.

An epoch shuffles the utterances, cuts each to the longest crop length that it fills, and deals crops of one length into
micro-batches; micro-batches are shuffled and dealt into steps. Workers share out the micro-batches of a step, so a step
holds the same audio whoever computes it, and any step can be rebuilt from its number alone: that is the whole of resume.
There is no padding, and crops start on multiples of 320 samples, so labels always fall on frames exactly.

Differs from fairseq on purpose: it cuts each batch to its shortest member, wherever that falls; here lengths come from a
fixed set, so compiled graphs and mask counts are few.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from hubert_ray.config.recipe import Pretrain
from hubert_ray.data.frames import SAMPLE_RATE, STRIDE, frames_of, samples_of
from hubert_ray.errors import TrainingError


@dataclass(frozen=True)
class MicroBatch:
    """Crops of one length: row r is `samples_of(frames)` samples of utterance `rows[r]` from `starts[r]` on."""

    step: int
    index: int  # position within the step; seeds masks and dropout
    rows: np.ndarray  # (B,) manifest rows
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


class BatchPlan:
    """The plan over utterances of `samples` (N,) 16 kHz samples each.

    Raises TrainingError where no utterance is as long as the shortest crop.
    """

    def __init__(self, samples: np.ndarray, settings: Pretrain):
        self._samples = np.asarray(samples, dtype=np.int64)
        self._seed = settings.seed
        self._frames = crop_frames(settings)
        crop_samples = (self._frames - 1) * STRIDE + samples_of(1)
        bucket = np.searchsorted(crop_samples, self._samples, side="right") - 1  # -1: too short for any crop
        self._members = [np.flatnonzero(bucket == b).astype(np.uint32) for b in range(len(self._frames))]
        self.utterances = int((bucket >= 0).sum())
        if not self.utterances:
            raise TrainingError(
                f"none of {len(self._samples)} utterances is as long as the shortest crop, "
                f"{settings.min_crop_seconds:g} s; lower pretrain.min_crop_seconds"
            )
        per_micro = settings.micro_batch_seconds * SAMPLE_RATE // crop_samples
        self._rows = np.maximum(per_micro, 1).astype(np.int64)
        counts = np.array([len(members) for members in self._members])
        self._micro_counts = -(-counts // self._rows)
        self.micro_batches_per_step = max(1, round(settings.batch_seconds / settings.micro_batch_seconds))
        self.steps_per_epoch = -(-int(self._micro_counts.sum()) // self.micro_batches_per_step)
        self._epochs: dict[int, tuple[list[np.ndarray], np.ndarray]] = {}
        self._lock = threading.Lock()

    def step(self, step: int) -> tuple[MicroBatch, ...]:
        """The micro-batches of a step (0-based). The last ones of an epoch are filled up from the epoch's beginning."""
        epoch, within = divmod(step, self.steps_per_epoch)
        orders, deal = self._epoch(epoch)
        slots = np.arange(self.micro_batches_per_step) + within * self.micro_batches_per_step
        return tuple(
            self._micro_batch(step, index, orders, int(deal[slot % len(deal)])) for index, slot in enumerate(slots)
        )

    def _epoch(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Per crop length the shuffled utterances, and the shuffled order of all micro-batches."""
        with self._lock:  # else each of several loading threads would make the order of the epoch that they come upon
            made = self._epochs.get(epoch)
            if made is None:
                rng = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
                orders = [rng.permutation(members) for members in self._members]
                made = (orders, rng.permutation(int(self._micro_counts.sum())))
                # Two are kept: whoever loads ahead may be in the next one already.
                self._epochs = {e: kept for e, kept in self._epochs.items() if e == epoch - 1} | {epoch: made}
            return made

    def _micro_batch(self, step: int, index: int, orders: list[np.ndarray], number: int) -> MicroBatch:
        bounds = np.cumsum(self._micro_counts)
        bucket = int(np.searchsorted(bounds, number, side="right"))
        first = (number - int(bounds[bucket]) + int(self._micro_counts[bucket])) * int(self._rows[bucket])
        rows = orders[bucket].take(np.arange(first, first + self._rows[bucket]), mode="wrap").astype(np.int64)
        frames = int(self._frames[bucket])
        rng = np.random.Generator(np.random.Philox(key=[self._seed, step], counter=[index, 0, 0, 1]))
        slack = (self._samples[rows] - samples_of(frames)) // STRIDE
        return MicroBatch(step, index, rows, rng.integers(0, slack + 1) * STRIDE, frames)


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
