"""What is minimised? Masked prediction with the feature penalty, and CTC. All of the loss, nothing else.

Masked prediction (HuBERT (Hsu et al. 2021) II-B, eq. 1; fairseq `criterions/hubert_criterion.py`):
total = masked_weight * CE_masked + unmasked_weight * CE_unmasked + feature_penalty * penalty * frames, where CE are
*sums* in nats over frames and label streams. The caller divides gradients and metrics by `frames` summed over all
workers: a mean over the global batch, never a mean of means.
The cosine head scores selected frames only: hidden ones, and the others only if they carry weight; else the accuracy on
unmasked frames is that of a sample of them.

Shapes: B utterances, T frames at 50 Hz, D width, N selected frames, K label streams, U letters, V letters + blank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_ray.config.recipe import Pretrain
from hubert_ray.errors import LabelError
from hubert_ray.model.hubert import Hubert, PretrainOutput

UNMASKED_SAMPLE = 128  # unmasked frames per micro batch whose accuracy is measured when they carry no weight
BLANK = 0


@dataclass(frozen=True)
class LossParts:
    """Sums over one micro batch; they add up over micro batches and workers. Tensors are scalars on the device."""

    total: Tensor  # to backprop, after division by the global sum of `frames`
    frames: int  # the divisor: masked frames, and the unmasked ones too if they carry weight
    masked_frames: int
    masked_nats: Tensor  # cross-entropy summed over masked frames and streams
    unmasked_nats: Tensor  # the same over unmasked frames; 0 when they carry no weight
    feature_penalty: Tensor  # mean square of the conv features: not a sum
    masked_correct: Tensor
    masked_total: int  # predictions behind masked_correct: masked frames x streams
    unmasked_correct: Tensor
    unmasked_total: int  # predictions behind unmasked_correct: sampled unmasked frames x streams


def pretrain_loss(
    model: Hubert, output: PretrainOutput, labels: Tensor, mask_BT: Tensor, settings: Pretrain
) -> LossParts:
    """The loss of one micro batch. `labels` are class ids, labels_BT or, with several streams, labels_BTK.

    Keep `mask_BT` on the CPU: then the frame counts are known without waiting for the device.
    """
    hidden_ND = output.hidden_BTD.flatten(0, 1)
    labels_NK = _checked_labels(labels, mask_BT, len(model.head.classes)).to(hidden_ND.device, non_blocking=True)
    masked_N = mask_BT.flatten().nonzero().squeeze(1)
    unmasked_N = (~mask_BT).flatten().nonzero().squeeze(1)
    masked_frames, frames = len(masked_N), len(masked_N)
    if settings.unmasked_weight > 0:
        frames += len(unmasked_N)
    elif len(unmasked_N) > UNMASKED_SAMPLE:
        unmasked_N = unmasked_N[:: len(unmasked_N) // UNMASKED_SAMPLE][:UNMASKED_SAMPLE]
    masked_nats, masked_correct = _score(model, hidden_ND, labels_NK, masked_N)
    with torch.set_grad_enabled(torch.is_grad_enabled() and settings.unmasked_weight > 0):
        unmasked_nats, unmasked_correct = _score(model, hidden_ND, labels_NK, unmasked_N)
    if settings.unmasked_weight == 0:
        unmasked_nats = torch.zeros_like(unmasked_nats)
    return LossParts(
        total=settings.masked_weight * masked_nats
        + settings.unmasked_weight * unmasked_nats
        + settings.feature_penalty * output.feature_penalty * frames,
        frames=frames,
        masked_frames=masked_frames,
        masked_nats=masked_nats.detach(),
        unmasked_nats=unmasked_nats.detach(),
        feature_penalty=output.feature_penalty.detach(),
        masked_correct=masked_correct,
        masked_total=masked_frames * labels_NK.shape[1],
        unmasked_correct=unmasked_correct,
        unmasked_total=len(unmasked_N) * labels_NK.shape[1],
    )


def _score(model: Hubert, hidden_ND: Tensor, labels_NK: Tensor, selected_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats and correct predictions, summed over the selected frames and over streams."""
    selected_N = selected_N.to(hidden_ND.device, non_blocking=True)
    nats = hidden_ND.new_zeros((), dtype=torch.float32)
    correct = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
    labels_NK = labels_NK.index_select(0, selected_N)
    for stream, logits_NC in enumerate(model.head(hidden_ND.index_select(0, selected_N))):
        nats = nats + F.cross_entropy(logits_NC, labels_NK[:, stream], reduction="sum")
        if len(selected_N):
            best_N, worst_N = logits_NC.detach().argmax(1), logits_NC.detach().argmin(1)
            # A row whose scores are all equal, or NaN, predicts nothing: it counts as wrong, as in fairseq.
            correct = correct + ((best_N == labels_NK[:, stream]) & (best_N != worst_N)).sum()
    return nats, correct


def _checked_labels(labels: Tensor, mask_BT: Tensor, streams: int) -> Tensor:
    """labels_NK as int64, N = all frames."""
    labels_BTK = labels.unsqueeze(2) if labels.dim() == 2 else labels
    if labels_BTK.shape != (*mask_BT.shape, streams):
        raise LabelError(
            f"labels: found shape {tuple(labels.shape)}, expected {(*mask_BT.shape, streams)} "
            "(utterances, frames of the mask, label streams of the head)"
        )
    return labels_BTK.flatten(0, 1).long()


def ctc_loss_sum(log_probs_BTV: Tensor, frames_B: Tensor, letters_BU: Tensor, letters_B: Tensor) -> Tensor:
    """CTC loss in nats summed over utterances; divide by the global number of utterances.

    `letters_BU` is padded with anything, `letters_B` are its lengths. An utterance with more letters than frames can
    align has infinite loss and counts as zero. fp32 whatever the model computes in.
    """
    return F.ctc_loss(
        log_probs_BTV.float().transpose(0, 1),
        letters_BU,
        frames_B,
        letters_B,
        blank=BLANK,
        reduction="sum",
        zero_infinity=True,
    )
