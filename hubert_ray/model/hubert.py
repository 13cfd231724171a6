"""What is the HuBERT network? Conv encoder, positional conv, transformer, prediction head; and every layer's output.

The order of operations, fairseq's: waveform -> 7 convs -> (gradient scale, feature penalty) -> LayerNorm, Linear,
dropout -> masked frames overwritten by one learned vector -> positional conv added -> transformer -> codeword head.

`Encoder` is the body that pretraining and the recogniser share; `Hubert` is the body with the masked-prediction head.
Padding: with `samples_B` every statistic is taken over valid samples only, so a padded batch equals batches of one.

Shapes: B utterances, S samples at 16 kHz, C conv channels, T frames at 50 Hz, D width, H heads, N selected frames,
K classes of one label stream. Sources: HuBERT (Hsu et al. 2021) II-E, Table I; fairseq `models/hubert/hubert.py`,
`models/wav2vec/wav2vec2.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_ray.config.sizes import ModelSize
from hubert_ray.data.frames import RECEPTIVE_FIELD, STRIDE
from hubert_ray.errors import HubertRayError
from hubert_ray.model.attention import attend
from hubert_ray.model.dropout import dropout
from hubert_ray.model.frontend import ConvEncoder, PositionalConv

LOGIT_TEMPERATURE = 0.1
INIT_STD = 0.02


class InputError(HubertRayError):
    """A waveform, a length or a mask that the network cannot take."""


@dataclass(frozen=True)
class PretrainOutput:
    """What the masked-prediction loss needs from one forward pass."""

    hidden_BTD: Tensor  # encoder output
    feature_penalty: Tensor  # scalar: mean square of the conv encoder's output, fp32


class TransformerLayer(nn.Module):
    """One block; pre-norm or post-norm. q, k and v are one matrix, rows in that order."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm_first = size.norm_first
        self.attention_dropout = size.attention_dropout
        self.dropout = size.dropout
        self.activation_dropout = size.activation_dropout
        self.qkv = nn.Linear(size.dim, 3 * size.dim)
        self.out = nn.Linear(size.dim, size.dim)
        self.attention_norm = nn.LayerNorm(size.dim)
        self.ffn_in = nn.Linear(size.dim, size.ffn_dim)
        self.ffn_out = nn.Linear(size.ffn_dim, size.dim)
        self.ffn_norm = nn.LayerNorm(size.dim)

    def forward(self, hidden_BTD: Tensor, keys_B11T: Tensor | None = None) -> Tensor:
        """`keys_B11T` is True where a key may be attended to; None means everywhere."""
        if self.norm_first:
            hidden_BTD = hidden_BTD + self._attention(self.attention_norm(hidden_BTD), keys_B11T)
            return hidden_BTD + self._ffn(self.ffn_norm(hidden_BTD))
        hidden_BTD = self.attention_norm(hidden_BTD + self._attention(hidden_BTD, keys_B11T))
        return self.ffn_norm(hidden_BTD + self._ffn(hidden_BTD))

    def _attention(self, hidden_BTD: Tensor, keys_B11T: Tensor | None) -> Tensor:
        batch, frames, dim = hidden_BTD.shape
        qkv = self.qkv(hidden_BTD).view(batch, frames, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        drop = self.attention_dropout if self.training else 0.0
        mixed_BHTd = attend(query, key, value, keys_B11T, drop)
        mixed_BTD = mixed_BHTd.transpose(1, 2).reshape(batch, frames, dim)
        return dropout(self.out(mixed_BTD), self.dropout, self.training)

    def _ffn(self, hidden_BTD: Tensor) -> Tensor:
        inner = dropout(F.gelu(self.ffn_in(hidden_BTD)), self.activation_dropout, self.training)
        return dropout(self.ffn_out(inner), self.dropout, self.training)


class Encoder(nn.Module):
    """The body: waveform in, hidden states out. Everything but the head."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.size = size
        self.conv = ConvEncoder(size.conv_channels, size.conv_norm, size.conv_bias)
        self.projection_norm = nn.LayerNorm(size.conv_channels)
        self.projection = nn.Linear(size.conv_channels, size.dim)
        self.mask_vector = nn.Parameter(torch.rand(size.dim))
        self.position = PositionalConv(size.dim, size.position_kernel, size.position_groups)
        self.norm = nn.LayerNorm(size.dim)
        self.layers = nn.ModuleList(TransformerLayer(size) for _ in range(size.layers))
        self.recompute_layers = False  # trade one more forward pass of the blocks for their activation memory
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)

    def draw_kept_layers(self) -> list[bool]:
        """LayerDrop: which blocks run in this forward pass. One draw of torch's CPU generator, before any other."""
        if not self.training or self.size.layer_drop == 0:
            return [True] * len(self.layers)
        return (torch.rand(len(self.layers)) >= self.size.layer_drop).tolist()

    def conv_features(self, wave_BS: Tensor, samples_B: Tensor | None = None) -> Tensor:
        """wave_BS -> conv_BTC, with the gradient that enters the conv encoder scaled (0: no gradient, no graph)."""
        if wave_BS.dim() != 2 or wave_BS.shape[1] < RECEPTIVE_FIELD:
            raise InputError(
                f"waveform: found shape {tuple(wave_BS.shape)}, expected (utterances, samples) with at least "
                f"{RECEPTIVE_FIELD} samples; drop or pad shorter audio"
            )
        scale = self.size.conv_grad_scale
        with torch.set_grad_enabled(torch.is_grad_enabled() and scale > 0):
            conv_BTC = self.conv(wave_BS, samples_B)
        return conv_BTC if scale in (0, 1) else _ScaleGradient.apply(conv_BTC, scale)

    def embed(
        self,
        conv_BTC: Tensor,
        frames_B: Tensor | None = None,
        mask_BT: Tensor | None = None,
        channel_mask_BD: Tensor | None = None,
    ) -> Tensor:
        """conv_BTC -> hidden_BTD, the input of the first block: projected, masked, padding zeroed, positions added."""
        hidden_BTD = self.projection(self.projection_norm(conv_BTC))
        hidden_BTD = dropout(hidden_BTD, self.size.input_dropout, self.training)
        if mask_BT is not None:
            if mask_BT.shape != hidden_BTD.shape[:2]:
                raise InputError(
                    f"mask: found shape {tuple(mask_BT.shape)}, expected {tuple(hidden_BTD.shape[:2])} "
                    "(utterances, frames_of(samples))"
                )
            mask_BT1 = mask_BT.to(hidden_BTD.device, non_blocking=True).unsqueeze(2)
            hidden_BTD = torch.where(mask_BT1, self.mask_vector.to(hidden_BTD.dtype), hidden_BTD)
        if channel_mask_BD is not None:
            hidden_BTD = hidden_BTD.masked_fill(channel_mask_BD.to(hidden_BTD.device).unsqueeze(1), 0.0)
        if frames_B is not None:
            hidden_BTD = hidden_BTD * _valid_frames(frames_B, hidden_BTD.shape[1]).unsqueeze(2).to(hidden_BTD.dtype)
        hidden_BTD = hidden_BTD + self.position(hidden_BTD)
        if not self.size.norm_first:
            hidden_BTD = self.norm(hidden_BTD)
        return dropout(hidden_BTD, self.size.dropout, self.training)

    def blocks(
        self, hidden_BTD: Tensor, frames_B: Tensor | None = None, kept_layers: Sequence[bool] | None = None
    ) -> list[Tensor]:
        """The outputs of the blocks run: entry 0 is the input, entry i the residual stream after block i.

        A list shorter than the model (`kept_layers` of length n) stops after block n.
        """
        kept_layers = self.draw_kept_layers() if kept_layers is None else kept_layers
        keys_B11T = None if frames_B is None else _valid_frames(frames_B, hidden_BTD.shape[1])[:, None, None]
        outputs = [hidden_BTD]
        for layer, kept in zip(self.layers, kept_layers, strict=False):
            if kept and self.recompute_layers and torch.is_grad_enabled():
                hidden_BTD = torch.utils.checkpoint.checkpoint(layer, hidden_BTD, keys_B11T, use_reentrant=False)
            elif kept:
                hidden_BTD = layer(hidden_BTD, keys_B11T)
            elif torch.is_grad_enabled():
                # A dropped block still takes part, with zero gradients: workers drop different ones, and a gradient that
                # exists on one worker only would set their reductions against each other.
                hidden_BTD = hidden_BTD + 0.0 * sum(parameter.sum() for parameter in layer.parameters())
            outputs.append(hidden_BTD)
        return outputs

    def finish(self, hidden_BTD: Tensor) -> Tensor:
        """The encoder output from the last block's: pre-norm sizes end in a LayerNorm."""
        return self.norm(hidden_BTD) if self.size.norm_first else hidden_BTD

    @torch.no_grad()
    def features(self, wave_BS: Tensor, layer: int | None = None, samples_B: Tensor | None = None) -> Tensor:
        """hidden_BTD after block `layer` (1-based, raw residual stream); 0 = input of block 1; None = encoder output.

        `samples_B` are the valid samples of a padded batch; frames past `frames_of(samples)` of a row are garbage.
        """
        layers = self.size.layers if layer is None else layer
        if not 0 <= layers <= self.size.layers:
            raise InputError(f"layer: found {layer}, expected 0 to {self.size.layers}, or None for the encoder output")
        hidden_BTD = self._layers(wave_BS, samples_B, layers)[-1]
        return self.finish(hidden_BTD) if layer is None else hidden_BTD

    @torch.no_grad()
    def all_layers(self, wave_BS: Tensor, samples_B: Tensor | None = None) -> list[Tensor]:
        """hidden_BTD of `features(layer=0)` to `features(layer=L)`, from one pass."""
        return self._layers(wave_BS, samples_B, self.size.layers)

    def _layers(self, wave_BS: Tensor, samples_B: Tensor | None, layers: int) -> list[Tensor]:
        if self.training:
            raise InputError("features are taken without dropout: found a model in train mode, call model.eval() first")
        frames_B = valid_frame_counts(samples_B, wave_BS)
        conv_BTC = self.conv_features(wave_BS, samples_B if frames_B is not None else None)
        return self.blocks(self.embed(conv_BTC, frames_B), frames_B, [True] * layers)


class PredictionHead(nn.Module):
    """Cosine similarity to a table of codewords, per label stream (HuBERT eq. 3). Streams share the encoder only."""

    def __init__(self, dim: int, codeword_dim: int, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.classes = classes
        self.projection = nn.Linear(dim, codeword_dim * len(classes))
        self.codewords = nn.Parameter(torch.rand(sum(classes), codeword_dim))

    def forward(self, hidden_ND: Tensor) -> list[Tensor]:
        """fp32 logits_NK of every stream. Give it selected frames only: this is the widest matmul of small models."""
        projected = self.projection(hidden_ND)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            parts = projected.float().chunk(len(self.classes), dim=1)
            tables = self.codewords.float().split(self.classes)
            return [
                F.normalize(part, dim=1) @ (F.normalize(table, dim=1) / LOGIT_TEMPERATURE).T
                for part, table in zip(parts, tables, strict=True)
            ]

    def logits(self, hidden_ND: Tensor, stream: int = 0) -> Tensor:
        """logits_NK of one stream."""
        return self(hidden_ND)[stream]


class Hubert(nn.Module):
    """The pretraining model. `classes` has one entry per label stream: the number of clusters of its codebook."""

    def __init__(self, size: ModelSize, classes: tuple[int, ...]) -> None:
        super().__init__()
        if not classes or min(classes) < 2:
            raise InputError(f"classes: found {classes}, expected one count of at least 2 per label stream")
        self.size = size
        self.encoder = Encoder(size)
        self.head = PredictionHead(size.dim, size.codeword_dim, tuple(classes))

    def forward(self, wave_BS: Tensor, mask_BT: Tensor, kept_layers: Sequence[bool] | None = None) -> PretrainOutput:
        """One pretraining pass over crops of equal length; `kept_layers` overrides the LayerDrop draw."""
        kept_layers = self.encoder.draw_kept_layers() if kept_layers is None else kept_layers
        conv_BTC = self.encoder.conv_features(wave_BS)
        penalty = conv_BTC.float().square().mean()
        hidden_BTD = self.encoder.blocks(self.encoder.embed(conv_BTC, mask_BT=mask_BT), kept_layers=kept_layers)[-1]
        return PretrainOutput(self.encoder.finish(hidden_BTD), penalty)


def valid_frame_counts(samples_B: Tensor | None, wave_BS: Tensor) -> Tensor | None:
    """frames_B of a padded batch, on the waveform's device; None if no row is padded (then no mask is ever built)."""
    if samples_B is None:
        return None
    if samples_B.shape != wave_BS.shape[:1] or int(samples_B.max()) > wave_BS.shape[1]:
        raise InputError(f"samples: found {samples_B.tolist()}, expected one length per row of {tuple(wave_BS.shape)}")
    if int(samples_B.min()) < RECEPTIVE_FIELD:
        raise InputError(f"samples: found a row of {int(samples_B.min())}, expected at least {RECEPTIVE_FIELD}")
    if int(samples_B.min()) == wave_BS.shape[1]:
        return None
    return ((samples_B - RECEPTIVE_FIELD) // STRIDE + 1).to(wave_BS.device)


def _valid_frames(frames_B: Tensor, frames: int) -> Tensor:
    """valid_BT: True on frames that are not padding."""
    return torch.arange(frames, device=frames_B.device) < frames_B.unsqueeze(1)


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx, value: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.scale, None
