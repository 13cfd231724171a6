"""How do frames attend to each other? torch's fused attention, but for one case: dropout on attention weights on a CPU.

There torch has no fused kernel, and its Bernoulli draws, one for each pair of frames, take longer than the matrix products.
`_DroppedAttention` draws as `dropout.py` does, folds both scales into the products, and takes a few heads at a time, so that
their scores stay in the processor's cache from the first product to the last.

Shapes: B utterances, H heads, T frames, d width of a head, N = B x H.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_ray.model.dropout import gain, random_numbers, threshold

_SCORES_AT_ONCE = 2**20  # 4 MiB


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
    """softmax -> dropout -> weighted sum. One tensor is kept for the backward pass: the weights, the dropped ones negative."""

    @staticmethod
    def forward(ctx, query_BHTd: Tensor, key_BHTd: Tensor, value_BHTd: Tensor, dropout: float) -> Tensor:
        query_NTd, key_NTd, value_NTd = (part.flatten(0, 1) for part in (query_BHTd, key_BHTd, value_BHTd))
        heads, frames, width = query_NTd.shape
        ctx.scale = 1 / math.sqrt(width)
        ctx.gain = gain(dropout)
        signed_NTT = query_NTd.new_empty(heads, frames, frames)
        mixed_NTd = torch.empty_like(query_NTd)
        numbers_NTT = torch.from_numpy(random_numbers((heads, frames, frames)))
        for some in _few_heads(heads, frames):
            weights = _product(query_NTd[some], key_NTd[some].transpose(1, 2), ctx.scale).softmax(2)
            kept = numbers_NTT[some].float().sub_(threshold(dropout) - 0.5)  # positive if kept; arithmetic beats a mask
            torch.copysign(weights, kept, out=signed_NTT[some])
            mixed_NTd[some] = _product(torch.relu(signed_NTT[some]), value_NTd[some], ctx.gain)
        ctx.save_for_backward(query_NTd, key_NTd, value_NTd, signed_NTT)
        return mixed_NTd.view(query_BHTd.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BHTd: Tensor):
        grad_NTd = grad_BHTd.flatten(0, 1)
        grads = [torch.empty_like(grad_NTd) for _ in range(3)]
        for some in _few_heads(*grad_NTd.shape[:2]):
            query, key, value, signed = (part[some] for part in ctx.saved_tensors)
            grad = grad_NTd[some]
            grad_weights = torch.ops.aten.threshold_backward(_product(grad, value.transpose(1, 2), ctx.gain), signed, 0)
            grad_scores = torch._softmax_backward_data(grad_weights, signed.abs(), 2, torch.float32)
            grads[0][some] = _product(grad_scores, key, ctx.scale)
            grads[1][some] = _product(grad_scores.transpose(1, 2), query, ctx.scale)
            grads[2][some] = _product(torch.relu(signed).transpose(1, 2), grad, ctx.gain)
        return *(grad.view(grad_BHTd.shape) for grad in grads), None


def _few_heads(heads: int, frames: int) -> list[slice]:
    count = max(1, _SCORES_AT_ONCE // frames**2)
    return [slice(start, start + count) for start in range(0, heads, count)]


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=scale)
