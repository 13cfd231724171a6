"""How does a waveform become frames, and how do frames learn their position? The two convolutions of HuBERT.

`ConvEncoder`: 7 convs, without bias but in some foreign models, 320 samples to a frame, GELU; GroupNorm (one group per
channel, over time) after the first (Base) or LayerNorm over channels after each (Large, X-Large).
`PositionalConv`: 128 taps, 16 groups, weight norm.
Everything is channels-last, so that norms and matrix products read memory in order. On CPUs, where torch's convolutions
run at half the speed of its matrix products, the strided convs are matrix products and the positional conv is an FFT.

Shapes: B utterances, S samples at 16 kHz, C conv channels, T steps or frames, W taps of a kernel, D width, G groups,
Q frequencies. Sources: HuBERT (Hsu et al. 2021) II-E, Table I; fairseq `models/wav2vec/wav2vec2.py`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_ray.data.frames import CONV_KERNELS, CONV_STRIDES

NORM_EPS = 1e-5
Norm = Literal["group", "layer"]


class ConvLayer(nn.Module):
    """Conv -> norm over time, over channels, or none -> GELU. A norm over time leaves nothing of a bias before it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, norm: Norm | None, bias: bool) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride = stride
        self.norm = norm
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel))
        nn.init.kaiming_normal_(self.weight)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias and norm != "group" else None
        if norm is not None:
            self.norm_weight = nn.Parameter(torch.ones(outputs))
            self.norm_bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, input_BTC: Tensor, length_B: Tensor | None = None) -> Tensor:
        """`length_B` are the valid output steps of padded rows; only the norm over time looks at them."""
        if self.norm == "group":
            return F.gelu(self._normed_over_time(input_BTC.squeeze(2), length_B))
        if input_BTC.shape[2] == 1:
            hidden_BTC = _windows(input_BTC.squeeze(2), self.kernel, self.stride) @ self.weight.squeeze(1).T
        else:
            hidden_BTC = strided_conv(input_BTC, self.weight, self.stride)
        if self.bias is not None:
            hidden_BTC = hidden_BTC + self.bias
        if self.norm == "layer":
            hidden_BTC = F.layer_norm(hidden_BTC, hidden_BTC.shape[2:], self.norm_weight, self.norm_bias, NORM_EPS)
        return F.gelu(hidden_BTC)

    def _normed_over_time(self, wave_BS: Tensor, length_B: Tensor | None) -> Tensor:
        """GroupNorm(conv(wave)) over the valid steps, as one conv whose weights differ per row.

        Mean and variance of a conv's output follow from mean and covariance of its input windows: W x W numbers per row
        instead of two passes over the largest tensor of the model. fp64, because a high-pass kernel on low-pass audio
        leaves a variance many orders below the covariance.
        """
        windows_BTW = _windows(wave_BS, self.kernel, self.stride)
        with torch.autocast(wave_BS.device.type, enabled=False):
            mean_BW, covariance_BWW = _window_statistics(windows_BTW.double(), length_B)
            weight_CW = self.weight.squeeze(1).double()
            variance_BC = ((weight_CW @ covariance_BWW) * weight_CW).sum(2)
            gain_BC = self.norm_weight * torch.rsqrt(variance_BC + NORM_EPS)
            bias_BC = self.norm_bias - gain_BC * (mean_BW @ weight_CW.T)
            weight_BWC = (gain_BC.unsqueeze(2) * weight_CW).transpose(1, 2)
        return torch.baddbmm(bias_BC.unsqueeze(1).to(wave_BS.dtype), windows_BTW, weight_BWC.to(wave_BS.dtype))


class ConvEncoder(nn.Module):
    """wave_BS -> conv_BTC, 7 layers."""

    def __init__(self, channels: int, norm: Norm, bias: bool) -> None:
        super().__init__()
        later: Norm | None = "layer" if norm == "layer" else None
        norms = [norm] + [later] * 6
        inputs = [1] + [channels] * 6
        self.layers = nn.ModuleList(
            ConvLayer(inputs[i], channels, CONV_KERNELS[i], CONV_STRIDES[i], norms[i], bias) for i in range(7)
        )

    def forward(self, wave_BS: Tensor, samples_B: Tensor | None = None) -> Tensor:
        """`samples_B`: valid samples of padded rows, or None if no row is padded."""
        length_B = (
            None if samples_B is None else (samples_B.to(wave_BS.device) - CONV_KERNELS[0]) // CONV_STRIDES[0] + 1
        )
        hidden_BTC = wave_BS.unsqueeze(2)
        for layer in self.layers:
            hidden_BTC = layer(hidden_BTC, length_B)
        return hidden_BTC


class PositionalConv(nn.Module):
    """Grouped conv over time with weight norm over the kernel axis: one gain per tap. The caller adds its input."""

    def __init__(self, dim: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.groups = groups
        self.weight_v = nn.Parameter(torch.empty(dim, dim // groups, kernel))
        nn.init.normal_(self.weight_v, std=math.sqrt(4.0 / (kernel * dim)))
        self.weight_g = nn.Parameter(self.weight_v.detach().norm(dim=(0, 1), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(dim))

    def weight(self) -> Tensor:
        """The kernel: each tap's slice of `weight_v` scaled to the norm `weight_g`."""
        direction = self.weight_v.float()
        return direction * (self.weight_g.float() / direction.square().sum((0, 1), keepdim=True).sqrt())

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """hidden_BTD -> GELU(conv) of the same shape; an even kernel gives one step too many, which is dropped."""
        if hidden_BTD.device.type == "cpu" and hidden_BTD.dtype == torch.float32:
            return F.gelu(grouped_conv_by_fft(hidden_BTD, self.weight(), self.groups) + self.bias)
        output_BDT = F.conv1d(
            hidden_BTD.transpose(1, 2),
            self.weight().to(hidden_BTD.dtype),
            self.bias.to(hidden_BTD.dtype),
            padding=self.kernel // 2,
            groups=self.groups,
        )
        return F.gelu(output_BDT[..., : hidden_BTD.shape[1]]).transpose(1, 2)


def _windows(wave_BS: Tensor, kernel: int, stride: int) -> Tensor:
    """windows_BTW: the samples under the kernel at each step; a view."""
    return wave_BS.unfold(1, kernel, stride)


def _window_statistics(windows_BTW: Tensor, length_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """(mean_BW, covariance_BWW) of each row's windows, over its first `length_B` steps."""
    if length_B is None:
        mean_B1W = windows_BTW.mean(1, keepdim=True)
        centred_BTW = windows_BTW - mean_B1W
        return mean_B1W.squeeze(1), centred_BTW.transpose(1, 2) @ centred_BTW / windows_BTW.shape[1]
    valid_BT1 = (torch.arange(windows_BTW.shape[1], device=length_B.device) < length_B[:, None]).unsqueeze(2)
    count_B11 = length_B[:, None, None]
    mean_B1W = (windows_BTW * valid_BT1).sum(1, keepdim=True) / count_B11
    centred_BTW = (windows_BTW - mean_B1W) * valid_BT1
    return mean_B1W.squeeze(1), centred_BTW.transpose(1, 2) @ centred_BTW / count_B11


def strided_conv(input_BTC: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Channels-last conv over time without bias. `weight` is (outputs, inputs, taps)."""
    if input_BTC.device.type == "cpu" and stride == 2 and weight.shape[2] in (2, 3):
        return _PairedConv.apply(input_BTC.contiguous(), weight.to(input_BTC.dtype))
    image_BC1T = input_BTC.transpose(1, 2).unsqueeze(2)  # as an image in channels-last layout: no copy
    return F.conv2d(image_BC1T, weight.unsqueeze(2), stride=(1, stride)).squeeze(2).transpose(1, 2)


class _PairedConv(torch.autograd.Function):
    """Conv of stride 2 with 2 or 3 taps as matrix products over memory as it lies.

    Steps 2t and 2t+1 are neighbours in memory: one row of 2C numbers that meets taps 0 and 1. A third tap meets every
    second step. Neither needs the copy of overlapping windows that makes im2col slow.
    """

    @staticmethod
    def forward(ctx, input_BTC: Tensor, weight_OCW: Tensor) -> Tensor:
        ctx.save_for_backward(input_BTC, weight_OCW)
        outputs, inputs, taps = weight_OCW.shape
        steps = (input_BTC.shape[1] - taps) // 2 + 1
        pair_weight = weight_OCW[:, :, :2].permute(2, 1, 0).reshape(2 * inputs, outputs)
        output_BTO = input_BTC.new_empty(input_BTC.shape[0], steps, outputs)
        for input_TC, output_TO in zip(input_BTC, output_BTO, strict=True):
            torch.mm(_pairs(input_TC, steps), pair_weight, out=output_TO)
            if taps == 3:
                output_TO.addmm_(_thirds(input_TC, steps), weight_OCW[:, :, 2].T)
        return output_BTO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BTO: Tensor) -> tuple[Tensor, Tensor]:
        input_BTC, weight_OCW = ctx.saved_tensors
        outputs, inputs, taps = weight_OCW.shape
        steps = grad_BTO.shape[1]
        pair_weight = weight_OCW[:, :, :2].permute(0, 2, 1).reshape(outputs, 2 * inputs)
        third_weight = weight_OCW[:, :, -1].contiguous()
        grad_input_BTC = torch.empty_like(input_BTC)
        grad_input_BTC[:, 2 * steps :] = 0
        grad_pair = weight_OCW.new_zeros(outputs, 2 * inputs)
        grad_third = weight_OCW.new_zeros(outputs, inputs)
        for input_TC, grad_TO, grad_input_TC in zip(input_BTC, grad_BTO, grad_input_BTC, strict=True):
            torch.mm(grad_TO, pair_weight, out=_pairs(grad_input_TC, steps))
            grad_pair.addmm_(grad_TO.T, _pairs(input_TC, steps))
            if taps == 3:
                _thirds(grad_input_TC, steps).addmm_(grad_TO, third_weight)
                grad_third.addmm_(grad_TO.T, _thirds(input_TC, steps))
        grad_weight = grad_pair.view(outputs, 2, inputs).transpose(1, 2)
        return grad_input_BTC, torch.cat([grad_weight, grad_third.unsqueeze(2)], dim=2)[:, :, :taps]


def _pairs(row_TC: Tensor, steps: int) -> Tensor:
    """Row t holds steps 2t and 2t+1; a view."""
    return row_TC[: 2 * steps].view(steps, 2 * row_TC.shape[1])


def _thirds(row_TC: Tensor, steps: int) -> Tensor:
    """Row t holds step 2t+2; a view."""
    return row_TC[2 : 2 * steps + 1 : 2]


def grouped_conv_by_fft(input_BTD: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Grouped conv over time with padding taps // 2, cut to the input's length. `weight` is (D, D / groups, taps)."""
    batch, frames, dim = input_BTD.shape
    taps, width = weight.shape[2], dim // groups
    length = _fft_length(frames + taps - 1)
    input_BDQ = torch.fft.rfft(input_BTD.transpose(1, 2), length)
    input_QGBc = input_BDQ.view(batch, groups, width, -1).permute(3, 1, 0, 2)
    weight_DcQ = torch.fft.rfft(weight, length).conj()  # a conv layer correlates
    weight_QGcd = weight_DcQ.view(groups, width, width, -1).permute(3, 0, 2, 1)
    output_BDQ = (input_QGBc @ weight_QGcd).permute(2, 1, 3, 0).reshape(batch, dim, -1)
    output_BDT = torch.fft.irfft(output_BDQ, length)
    # Entry m sums weight[w] * input[m + w]; the output at t starts taps // 2 before t, so it is entry t - taps // 2.
    return torch.roll(output_BDT, taps // 2, dims=2)[..., :frames].transpose(1, 2)


def _fft_length(least: int) -> int:
    """The smallest even length from `least` on whose prime factors are 2, 3 and 5: those that FFTs are fast at."""
    length = least + least % 2
    while 30 ** length.bit_length() % length:
        length += 2
    return length
