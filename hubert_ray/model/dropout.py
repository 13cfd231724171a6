"""Which numbers are dropped? torch's dropout, but for CPUs, where its Bernoulli draws cost more than they hide.

There each decision takes 16 random bits, four decisions to a draw, from a generator seeded by torch's own: `torch.manual_seed`
still decides everything. A probability is so rounded to 1 / 65536, and what is kept is scaled by that.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 2**16


def dropout(value: Tensor, probability: float, training: bool) -> Tensor:
    """`value` with numbers set to 0 with this probability and the rest scaled up; itself where there is nothing to do."""
    if probability == 0 or not training:
        return value
    if value.device.type != "cpu" or probability == 1:
        return F.dropout(value, probability)
    return _Dropout.apply(value, probability)


def random_numbers(shape: tuple[int, ...]) -> np.ndarray:
    """Uniform int16; one draw of torch's generator."""
    seed = int(torch.randint(2**62, ()))
    count = math.prod(shape)
    return np.random.SFC64(seed).random_raw((count + 3) // 4).view(np.int16)[:count].reshape(shape)


def threshold(probability: float) -> int:
    """Random numbers below this one drop."""
    return round(probability * _LEVELS) - _LEVELS // 2


def gain(probability: float) -> float:
    """What kept numbers are multiplied by, so that dropping changes no expectation."""
    return 1 / (1 - round(probability * _LEVELS) / _LEVELS)


class _Dropout(torch.autograd.Function):
    """Multiplies by bytes of 0 and 1: torch's CPU kernels for bool masks are several times slower."""

    @staticmethod
    def forward(ctx, value: Tensor, probability: float) -> Tensor:
        kept = torch.from_numpy((random_numbers(tuple(value.shape)) >= threshold(probability)).view(np.uint8))
        ctx.save_for_backward(kept)
        ctx.gain = gain(probability)
        return (value * kept).mul_(ctx.gain)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (kept,) = ctx.saved_tensors
        return (grad * kept).mul_(ctx.gain), None
