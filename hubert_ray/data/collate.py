"""How do planned crops become tensors? Waveform and labels are cut together, so they cannot drift apart."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from hubert_ray.data.audio import normalise
from hubert_ray.data.batching import MicroBatch
from hubert_ray.data.frames import SAMPLE_RATE, crop_labels, samples_of
from hubert_ray.data.index import Index
from hubert_ray.data.labels import LabelStore
from hubert_ray.data.loader import FETCHES
from hubert_ray.data.shards import AudioReader, Manifest


@dataclass(frozen=True)
class Crops:
    """A micro-batch in memory: waveforms (B, S) float32 and the label of each model frame in each stream (B, T, K) int64."""

    wave_BS: torch.Tensor
    labels_BTK: torch.Tensor


@dataclass(frozen=True)
class Padded:
    """Whole utterances, zero-padded to the longest: waveforms (B, S) float32 and true lengths (B,) int64."""

    wave_BS: torch.Tensor
    samples_B: torch.Tensor


class UtteranceReader:
    """Waveforms of the rows of an index or a manifest, normalised over the whole utterance where the model wants it. For many
    threads at once."""

    def __init__(self, reader: AudioReader, rows: Index | Manifest, normalize: bool):
        self._reader = reader
        self._shard_of = rows.shard_of
        self._ranges = [rows.numbers(column) for column in ("offset", "size", "first", "stored_samples")]
        self._samples = rows.numbers("samples")
        self._normalize = normalize
        self._threads = ThreadPoolExecutor(FETCHES, thread_name_prefix="read")

    def wave(self, row: int) -> np.ndarray:
        """The waveform of a whole utterance, shape (S,)."""
        wave_S = self._reader.wave(self._shard_of(row), *(int(column[row]) for column in self._ranges))
        return normalise(wave_S) if self._normalize else wave_S

    def waves(self, rows: Iterable[int]) -> list[np.ndarray]:
        """The waveforms of several utterances, read side by side."""
        return list(self._threads.map(self.wave, rows))

    def crops(self, micro_batch: MicroBatch, labels: LabelStore) -> Crops:
        """The crops of a micro-batch with their labels."""
        size = samples_of(micro_batch.frames)
        rows, starts = micro_batch.rows.tolist(), micro_batch.starts.tolist()
        wave_BS = torch.empty(len(rows), size)

        def cut(wave_S: torch.Tensor, row: int, start: int) -> None:
            wave_S.copy_(torch.from_numpy(self.wave(row))[start : start + size])

        cuts = self._threads.map(cut, wave_BS, rows, starts)
        targets = [
            labels.window(row, crop_labels(start, micro_batch.frames, labels.frame_rate_hz))
            for row, start in zip(rows, starts, strict=True)
        ]
        deque(cuts, maxlen=0)  # until all are there
        return Crops(wave_BS, torch.from_numpy(np.stack(targets).astype(np.int64)))

    def groups(self, seconds: float) -> Iterator[list[int]]:
        """All rows in order, in groups of about `seconds` of audio: what may be decoded at a time."""
        group_N = np.cumsum(self._samples, dtype=np.int64) // int(seconds * SAMPLE_RATE)
        for rows_N in np.split(np.arange(len(group_N)), np.flatnonzero(np.diff(group_N)) + 1):
            if len(rows_N):
                yield rows_N.tolist()

    def padded(self, rows: list[int]) -> Padded:
        """Whole utterances, never cropped, padded with zeros."""
        return pad(self.waves(rows))


def pad(waves: list[np.ndarray]) -> Padded:
    """Stacks waveforms of different lengths."""
    samples = [len(wave) for wave in waves]
    stacked = np.zeros((len(waves), max(samples)), dtype=np.float32)
    for row, wave in enumerate(waves):
        stacked[row, : len(wave)] = wave
    return Padded(torch.from_numpy(stacked), torch.tensor(samples))
