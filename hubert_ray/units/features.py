"""What does a teacher see? Features of whole utterances behind one signature: MFCC, or a layer of a trained model.

    teacher(waves) -> one (F, D) float32 array per waveform, F frames at `teacher.frame_rate_hz`

Extension point: a new teacher is a class with `frame_rate_hz`, `dim` and `__call__`, and a tag in config/recipe.py.
Notation: S samples at 16 kHz, F feature frames, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
import torchaudio.compliance.kaldi
import torchaudio.functional

from hubert_ray.config.recipe import Mfcc
from hubert_ray.data.audio import normalise
from hubert_ray.data.collate import pad
from hubert_ray.data.frames import SAMPLE_RATE, frames_of
from hubert_ray.model.hubert import Encoder

BATCH_SECONDS = 60.0  # of padded audio that a model sees at a time


class FeatureExtractor(Protocol):
    """Deterministic features of whole utterances; the same whatever they are batched with."""

    frame_rate_hz: int
    dim: int

    def __call__(self, waves: list[np.ndarray]) -> list[np.ndarray]: ...


class MfccExtractor:
    """13 cepstra with first and second deltas, 100 Hz, as fairseq's `examples/hubert/simple_kmeans/dump_mfcc_feature.py`:
    Kaldi's MFCC without energy, mean subtraction or dither, on waveforms in [-1, 1]; frames are 25 ms long, 10 ms apart,
    none reaching over the edges.

    With `splice` = 3 a frame is followed by what its neighbours have, regrouped by derivative order: the cepstra of the frame
    before, of this one and of the next, then their first deltas, then their second ones, 117 numbers. HuBERT (Hsu et al. 2021) V-E
    does not say what stands in for the neighbours at the edges; here the outermost frame does."""

    frame_rate_hz = 100

    def __init__(self, settings: Mfcc | None = None):
        self._settings = settings or Mfcc()
        self.dim = self._settings.dim

    def __call__(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        return [self._one(wave_S) for wave_S in waves]

    def _one(self, wave_S: np.ndarray) -> np.ndarray:
        wave_1S = torch.from_numpy(wave_S).unsqueeze(0)
        mfcc_FC = torchaudio.compliance.kaldi.mfcc(wave_1S, sample_frequency=SAMPLE_RATE, use_energy=False)
        static_CF = mfcc_FC.T
        delta_CF = torchaudio.functional.compute_deltas(static_CF)
        second_CF = torchaudio.functional.compute_deltas(delta_CF)
        orders = (static_CF, delta_CF, second_CF)
        chosen = [_spliced(orders[order], self._settings.splice) for order in self._settings.derivatives]
        return torch.cat(chosen).T.contiguous().numpy()


def _spliced(values_CF: torch.Tensor, frames: int) -> torch.Tensor:
    """Each frame's values under those of its neighbours, earliest first: (C x frames, F)."""
    if frames == 1:
        return values_CF
    padded_CF = torch.nn.functional.pad(values_CF, (frames // 2, frames // 2), mode="replicate")
    return torch.cat([padded_CF[:, start : start + values_CF.shape[1]] for start in range(frames)])


class LayerExtractor:
    """Output of transformer block `layer` at 50 Hz: 1-based, after the residual, as fairseq's `dump_hubert_feature.py`.
    Layer 0 is the input of the first block. Utterances are padded together only as far as masked statistics keep each
    one's result its own."""

    frame_rate_hz = 50

    def __init__(self, encoder: Encoder, layer: int, batch_seconds: float = BATCH_SECONDS):
        self._encoder = encoder.eval()
        self._device = next(encoder.parameters()).device
        self._layer = layer
        self._batch_seconds = batch_seconds
        self.dim = encoder.size.dim

    @torch.inference_mode()
    def __call__(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        waves = [normalise(wave_S) for wave_S in waves] if self._encoder.size.normalize_waveform else waves
        results: list[np.ndarray] = [np.empty(0)] * len(waves)
        for chosen in batches([len(wave_S) for wave_S in waves], self._batch_seconds):
            batch = pad([waves[i] for i in chosen])
            hidden_BTD = self._encoder.features(batch.wave_BS.to(self._device), self._layer, batch.samples_B)
            for row, i in enumerate(chosen):
                results[i] = hidden_BTD[row, : frames_of(len(waves[i]))].float().cpu().numpy()
        return results


def batches(lengths: Sequence[int] | np.ndarray, seconds: float = BATCH_SECONDS) -> Iterator[list[int]]:
    """Positions grouped by similar length (in samples), at most `seconds` of padded audio a group; shortest first.

    The more utterances there are to choose from, the less is padding: nothing of a group need be in memory to be grouped.
    """
    budget = int(seconds * SAMPLE_RATE)
    chosen: list[int] = []
    for i in np.argsort(np.asarray(lengths), kind="stable").tolist():
        if chosen and (len(chosen) + 1) * lengths[i] > budget:
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen
