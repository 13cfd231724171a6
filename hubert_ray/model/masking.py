"""Which frames are hidden? Span masks of pretraining, time and channel masks of fine-tuning.

A pretraining mask is a pure function of (seed, step, micro batch, row): the number of workers never changes it.
fairseq draws each row's spans and then un-masks random frames until all 8 rows of a batch hide as many frames as the
row that hides fewest. Here that number is a constant per length (`masked_count`, fairseq's expectation), so every
micro batch of a length has the same shape and the masked share does not depend on the batch.

Shapes: B utterances, T frames at 50 Hz, D width.
Sources: HuBERT (Hsu et al. 2021) II-B, Fig. 3; wav2vec 2.0 (Baevski et al. 2020) 3.1;
fairseq `data/data_utils.py`, compute_mask_indices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hubert_ray.config.recipe import Finetune, Mask
from hubert_ray.errors import HubertRayError

EQUALISED_ROWS = 8  # rows of a fairseq batch (required_batch_size_multiple), whose minimum all rows are cut to
SIMULATED_BATCHES = 1024
FINETUNE_MIN_SPANS = 2
_FINETUNE_STREAM = 0x46  # keeps fine-tuning's random numbers apart from pretraining's


class MaskError(HubertRayError):
    """A row too short for its mask."""


@dataclass(frozen=True)
class FinetuneMask:
    """Where fine-tuning hides its input."""

    time_BT: Tensor  # bool, True = overwritten by the mask vector
    channel_BD: Tensor  # bool, True = set to zero for the whole utterance


def span_mask(frames: int, mask: Mask, rng: np.random.Generator) -> np.ndarray:
    """One row before equalising: spans of `mask.length`, starts without replacement, overlaps allowed. bool (T,)

    The number of spans is prob * T / length, rounded up or down at random, at least `min_spans`.
    No span starts later than T - length - 1, so the last frame is never hidden.
    """
    spans = max(mask.min_spans, int(mask.prob * frames / mask.length + rng.random()))
    hidden = np.zeros(frames, dtype=bool)
    if spans == 0:
        return hidden
    if frames - mask.length < spans:
        raise MaskError(
            f"mask: found a row of {frames} frames, expected at least {mask.length + spans} for {spans} spans of "
            f"{mask.length}; raise min_crop_seconds or shorten the spans"
        )
    starts = rng.choice(frames - mask.length, spans, replace=False)
    hidden[starts[:, None] + np.arange(mask.length)] = True
    return hidden


@lru_cache(maxsize=4096)
def masked_count(frames: int, mask: Mask) -> int:
    """Frames hidden in every pretraining row of this length: the expected minimum over 8 rows, by seeded simulation."""
    rng = np.random.default_rng((0, frames))
    rows = EQUALISED_ROWS * SIMULATED_BATCHES
    low = int(mask.prob * frames / mask.length)
    if frames - mask.length < max(mask.min_spans, low + 1):
        raise MaskError(f"mask: found a row of {frames} frames, expected more than {mask.length + max(2, low)}")
    spans_R = np.maximum(mask.min_spans, (mask.prob * frames / mask.length + rng.random(rows)).astype(int))
    order_RP = rng.random((rows, frames - mask.length), dtype=np.float32).argsort(axis=1)[:, : spans_R.max()]
    chosen_RP = np.arange(spans_R.max()) < spans_R[:, None]
    edges_RT = np.zeros((rows, frames + 1), dtype=np.int16)  # +1 where a span starts, -1 after it ends
    row_RP = np.broadcast_to(np.arange(rows)[:, None], order_RP.shape)
    np.add.at(edges_RT, (row_RP[chosen_RP], order_RP[chosen_RP]), 1)
    np.add.at(edges_RT, (row_RP[chosen_RP], order_RP[chosen_RP] + mask.length), -1)
    count_R = (edges_RT.cumsum(axis=1) > 0).sum(axis=1)
    return round(float(count_R.reshape(-1, EQUALISED_ROWS).min(axis=1).mean()))


def batch_mask(rows: int, frames: int, mask: Mask, seed: int, step: int, micro_batch: int) -> Tensor:
    """mask_BT of one pretraining micro batch: exactly `masked_count` hidden frames per row. On the CPU.

    `micro_batch` numbers the micro batch within the optimiser step over all workers, never within one worker.
    """
    count = masked_count(frames, mask)
    mask_BT = np.stack(
        [
            _row_of_count(frames, mask, count, np.random.default_rng((seed, step, micro_batch, row)))
            for row in range(rows)
        ]
    )
    return torch.from_numpy(mask_BT)


def _row_of_count(frames: int, mask: Mask, count: int, rng: np.random.Generator) -> np.ndarray:
    """Spans drawn until they hide at least `count` frames, then random frames un-masked down to it."""
    hidden = span_mask(frames, mask, rng)
    while (surplus := int(hidden.sum()) - count) < 0:
        hidden = span_mask(frames, mask, rng)
    if surplus:
        hidden[rng.choice(np.flatnonzero(hidden), surplus, replace=False)] = False
    return hidden


def finetune_mask(
    frames_B: Tensor,
    frames: int,
    width: int,
    time_prob: float,
    settings: Finetune,
    seed: int,
    step: int,
    micro_batch: int,
) -> FinetuneMask:
    """Time spans inside each row's valid frames and zeroed bands of channels; rows are not equalised.

    `frames` is the padded length, `width` the model's; a row too short for its spans stays visible.
    """
    time = Mask(prob=time_prob, length=settings.mask_length, min_spans=FINETUNE_MIN_SPANS if time_prob > 0 else 0)
    channel = Mask(prob=settings.channel_mask_prob, length=settings.channel_mask_length, min_spans=0)
    time_BT = np.zeros((len(frames_B), frames), dtype=bool)
    channel_BD = np.zeros((len(frames_B), width), dtype=bool)
    for row, valid in enumerate(frames_B.tolist()):
        rng = np.random.default_rng((_FINETUNE_STREAM, seed, step, micro_batch, row))
        channel_BD[row] = span_mask(width, channel, rng)
        if valid - time.length > max(time.min_spans, int(time.prob * valid / time.length) + 1):
            time_BT[row, :valid] = span_mask(valid, time, rng)
    return FinetuneMask(torch.from_numpy(time_BT), torch.from_numpy(channel_BD))
