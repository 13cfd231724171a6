"""What does a teacher see? Features of whole utterances behind one signature: MFCC, or a layer of a trained model.

    teacher(waves) -> one (F, D) float32 array per waveform, F frames at `teacher.frame_rate_hz`

Extension point: a new teacher is a class with `frame_rate_hz`, `dim` and `__call__`, and a tag in config/recipe.py.
Notation: S samples at 16 kHz, F feature frames, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
import torchaudio.compliance.kaldi
import torchaudio.functional

from hubert_ray.config.recipe import Layer, Mfcc
from hubert_ray.data.audio import normalise
from hubert_ray.data.collate import UtteranceReader
from hubert_ray.data.frames import SAMPLE_RATE
from hubert_ray.data.loader import ahead
from hubert_ray.model.hubert import Encoder

GROUP_SECONDS = 600.0  # of audio whose features are in memory at a time


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

    frame_rate_hz = Mfcc.frame_rate_hz

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
    Layer 0 is the input of the first block.

    One utterance at a time: beside others, even of its own length, it would be rounded otherwise, and a frame halfway between
    two centroids would get another label in other company (measured with padding: 1 label of 19,000).
    """

    frame_rate_hz = Layer.frame_rate_hz

    def __init__(self, encoder: Encoder, layer: int):
        self._encoder = encoder.eval()
        self._device = next(encoder.parameters()).device
        self._layer = layer
        self.dim = encoder.size.dim

    def __call__(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        return [self._one(wave_S) for wave_S in waves]

    @torch.inference_mode()
    def _one(self, wave_S: np.ndarray) -> np.ndarray:
        wave_S = normalise(wave_S) if self._encoder.size.normalize_waveform else wave_S
        hidden_1TD = self._encoder.features(torch.from_numpy(wave_S)[None].to(self._device), self._layer)
        return hidden_1TD[0].float().cpu().numpy()


def in_groups(extractor: FeatureExtractor, utterances: UtteranceReader) -> Iterator[list[np.ndarray]]:
    """Features of all utterances in their order, as lists of about ten minutes of audio; the next ten are read meanwhile."""
    for waves in ahead(utterances.waves, utterances.groups(GROUP_SECONDS), 1):
        yield extractor(waves)
