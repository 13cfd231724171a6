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
    if value.device.type != "cpu":
        return F.dropout(value, probability)
    return _Dropout.apply(value, probability)


def drop_mask(shape: tuple[int, ...], probability: float) -> Tensor:
    """bool: True, with this probability, where a number is to be dropped. CPU; one draw of torch's generator."""
    seed = int(torch.randint(2**62, ()))
    count = math.prod(shape)
    words = np.random.SFC64(seed).random_raw((count + 3) // 4)
    numbers = torch.from_numpy(words.view(np.int16)[:count])
    return (numbers < round(probability * _LEVELS) - _LEVELS // 2).view(shape)


def gain(probability: float) -> float:
    """What kept numbers are multiplied by, so that dropping changes no expectation."""
    return 1 / (1 - round(probability * _LEVELS) / _LEVELS)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, probability: float) -> Tensor:
        dropped = drop_mask(tuple(value.shape), probability)
        ctx.save_for_backward(dropped)
        ctx.gain = gain(probability)
        return value.masked_fill(dropped, 0).mul_(ctx.gain)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (dropped,) = ctx.saved_tensors
        return grad.masked_fill(dropped, 0).mul_(ctx.gain), None
