"""How do weights move? AdamW as fairseq sets it, and the two learning-rate schedules.

Learning rates are functions of `step`, the number of updates already made (0 for the first update), as in fairseq.
Sources: HuBERT (Hsu et al. 2021) IV-C (pretraining: polynomial) and IV-D (fine-tuning: tri-stage, as wav2vec 2.0);
fairseq `optim/adam.py`, whose decay is decoupled, and `optim/lr_scheduler/`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

TRI_STAGE_INITIAL_SCALE = 0.01


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """One group: fairseq decays everything that is trained, biases and norms included."""
    return [
        {"params": [parameter for parameter in parameters if parameter.requires_grad], "weight_decay": weight_decay}
    ]


def adamw(
    parameters: Iterable[nn.Parameter], betas: tuple[float, float], eps: float, weight_decay: float = 0.0
) -> torch.optim.AdamW:
    """Adam with decoupled weight decay, one fused kernel. The learning rate starts at 0: set it before each step."""
    return torch.optim.AdamW(parameter_groups(parameters, weight_decay), lr=0.0, betas=betas, eps=eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def polynomial_lr(step: int, steps: int, warmup_share: float, peak: float) -> float:
    """Linear from 0 to `peak` over the first `warmup_share` of `steps`, then linear to 0.

    The first update uses the rate of the second: fairseq never trains at 0.
    """
    warmup = round(steps * warmup_share)
    if step < warmup:
        return peak * max(step, 1) / warmup
    if step >= steps:
        return 0.0
    return peak * (steps - step) / (steps - warmup)


def tri_stage_lr(step: int, steps: int, shares: tuple[float, float, float], peak: float, final_scale: float) -> float:
    """Linear from 1 % of `peak` over the first share, held over the second, exponential to `final_scale` at last."""
    warmup, hold, decay = (round(steps * share) for share in shares)
    if step < warmup:
        scale = TRI_STAGE_INITIAL_SCALE + (1 - TRI_STAGE_INITIAL_SCALE) * step / warmup
    elif step < warmup + hold:
        scale = 1.0
    elif step < warmup + hold + decay:
        scale = math.exp(math.log(final_scale) * (step - warmup - hold) / decay)
    else:
        scale = final_scale
    return peak * scale
