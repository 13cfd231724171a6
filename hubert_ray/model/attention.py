"""How do frames attend to each other? torch's fused attention, but for one case: dropout on attention weights on a CPU.

There torch has no fused kernel, and its Bernoulli draws, one for each pair of frames, take longer than the matrix products.
`_DroppedAttention` takes the mask from `dropout.py` and folds both scales into the products.

Shapes: B utterances, H heads, T frames, d width of a head, N = B x H.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_ray.model.dropout import drop_mask, gain


def attend(
    query_BHTd: Tensor, key_BHTd: Tensor, value_BHTd: Tensor, keys_B11T: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """mixed_BHTd: values weighted by softmax(query key / sqrt(d)), weights dropped with probability `dropout`.

    `keys_B11T` is True where a key may be attended to; None means everywhere.
    """
    if dropout > 0 and keys_B11T is None and query_BHTd.device.type == "cpu" and query_BHTd.dtype == torch.float32:
        return _DroppedAttention.apply(query_BHTd, key_BHTd, value_BHTd, dropout)
    return F.scaled_dot_product_attention(query_BHTd, key_BHTd, value_BHTd, attn_mask=keys_B11T, dropout_p=dropout)


class _DroppedAttention(torch.autograd.Function):
    """softmax -> dropout -> weighted sum, keeping the weights and the mask for the backward pass."""

    @staticmethod
    def forward(ctx, query_BHTd: Tensor, key_BHTd: Tensor, value_BHTd: Tensor, dropout: float) -> Tensor:
        query_NTd, key_NTd, value_NTd = (part.flatten(0, 1) for part in (query_BHTd, key_BHTd, value_BHTd))
        ctx.shape = query_BHTd.shape
        ctx.scale = 1 / math.sqrt(query_NTd.shape[2])
        ctx.gain = gain(dropout)
        weights_NTT = _product(query_NTd, key_NTd.transpose(1, 2), ctx.scale).softmax(2)
        dropped_NTT = drop_mask(tuple(weights_NTT.shape), dropout)
        ctx.save_for_backward(query_NTd, key_NTd, value_NTd, weights_NTT, dropped_NTT)
        return _product(weights_NTT.masked_fill(dropped_NTT, 0), value_NTd, ctx.gain).view(ctx.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BHTd: Tensor):
        query_NTd, key_NTd, value_NTd, weights_NTT, dropped_NTT = ctx.saved_tensors
        grad_NTd = grad_BHTd.flatten(0, 1)
        kept_NTT = weights_NTT.masked_fill(dropped_NTT, 0)
        grad_value_NTd = _product(kept_NTT.transpose(1, 2), grad_NTd, ctx.gain)
        grad_NTT = _product(grad_NTd, value_NTd.transpose(1, 2), ctx.gain).masked_fill_(dropped_NTT, 0)
        grad_NTT = torch._softmax_backward_data(grad_NTT, weights_NTT, 2, torch.float32)
        grads = (
            _product(grad_NTT, key_NTd, ctx.scale),
            _product(grad_NTT.transpose(1, 2), query_NTd, ctx.scale),
            grad_value_NTd,
        )
        return *(grad.view(ctx.shape) for grad in grads), None


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=scale)
