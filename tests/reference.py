"""What should the fast code compute? Slow, literal oracles, written from the papers' definitions, not from our code."""

from __future__ import annotations

import math

import numpy as np
import torch


def frames_by_convs(samples: int) -> int:
    """Output length of seven convolutions, one after the other."""
    for kernel, stride in zip((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), strict=True):
        samples = (samples - kernel) // stride + 1
        if samples <= 0:
            return 0
    return samples


def positive_first_nats(projected_ND: torch.Tensor, table_CD: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """fairseq's form of the loss: the true codeword at index 0, then all codewords, its equals at -inf."""
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(projected_ND.double(), labels_N.tolist(), strict=True):
        candidates = torch.cat([table_CD[label][None], table_CD]).double()
        scores = torch.cosine_similarity(row[None], candidates, dim=1) / 0.1
        same = (candidates == candidates[0]).all(dim=1)
        same[0] = False
        scores = scores.masked_fill(same, -math.inf)
        total = total + torch.logsumexp(scores, 0) - scores[0]
    return total


def slow_spans(frames: int, prob: float, length: int, min_spans: int, rng: np.random.Generator) -> set[int]:
    """One row's hidden frames, span by span."""
    spans = max(min_spans, math.floor(prob * frames / length + rng.uniform()))
    starts: list[int] = []
    while len(starts) < spans:
        start = int(rng.integers(0, frames - length))
        if start not in starts:
            starts.append(start)
    return {frame for start in starts for frame in range(start, start + length)}


def slow_equalised_count(frames: int, prob: float, length: int, min_spans: int, batches: int, rows: int = 8) -> float:
    """Mean over batches of the smallest masked count of `rows` rows."""
    rng = np.random.default_rng(99)
    counts = [min(len(slow_spans(frames, prob, length, min_spans, rng)) for _ in range(rows)) for _ in range(batches)]
    return sum(counts) / batches


def slow_tri_stage(steps: int, warmup: int, hold: int, decay: int, peak: float, final_scale: float) -> list[float]:
    """The tri-stage rate of every update, by stepping through it."""
    rates, lr = [], 0.01 * peak
    for _ in range(warmup):
        rates.append(lr)
        lr += (peak - 0.01 * peak) / warmup
    rates += [peak] * hold
    lr = peak
    for _ in range(decay):
        rates.append(lr)
        lr *= final_scale ** (1 / decay)
    rates += [peak * final_scale] * (steps - len(rates))
    return rates[:steps]


def slow_mfcc(wave_S: np.ndarray) -> np.ndarray:
    """Kaldi's compute-mfcc-feats as fairseq calls it (no energy, no dither, edges snipped), (F, 13), in float64."""

    def mel(hz: float) -> float:
        return 1127 * math.log(1 + hz / 700)

    window = [(0.5 - 0.5 * math.cos(2 * math.pi * n / 399)) ** 0.85 for n in range(400)]  # Povey's
    edges = np.linspace(mel(20), mel(8000), 25)  # 23 triangles, in mel
    rows = []
    for start in range(0, len(wave_S) - 400 + 1, 160):
        frame = wave_S[start : start + 400].astype(np.float64)
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.fft(np.concatenate([frame * window, np.zeros(112)]))) ** 2
        energies = []
        for left, centre, right in zip(edges, edges[1:], edges[2:], strict=False):
            slopes = [
                (min(mel(16_000 / 512 * k) - left, right - mel(16_000 / 512 * k)) / (centre - left)) for k in range(256)
            ]
            energies.append(sum(max(0.0, slope) * power[k] for k, slope in enumerate(slopes)))
        logs = [math.log(max(energy, float(np.finfo(np.float32).eps))) for energy in energies]
        cepstra = []
        for q in range(13):
            scale = math.sqrt((1 if q == 0 else 2) / 23)
            cepstrum = scale * sum(value * math.cos(math.pi / 23 * (j + 0.5) * q) for j, value in enumerate(logs))
            cepstra.append((1 + 11 * math.sin(math.pi * q / 22)) * cepstrum)
        rows.append(cepstra)
    return np.array(rows)


def slow_deltas(features_FC: np.ndarray) -> np.ndarray:
    """Slope of a straight line through 5 frames, the first and last frame repeated past the edges."""
    last = len(features_FC) - 1
    slopes = np.zeros_like(features_FC)
    for t in range(len(features_FC)):
        for k in (-2, -1, 1, 2):
            slopes[t] += k * features_FC[min(max(t + k, 0), last)]
    return slopes / (4 + 1 + 1 + 4)
