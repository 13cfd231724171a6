"""How large is each model? Every number of TINY, BASE, LARGE and XLARGE, spelled out.

Source: HuBERT Table I and fairseq's three pretraining configurations; the name fairseq gives a field stands behind it.
The paper's Table I prints 8 attention heads for Base; the released weights have 12 (head width 64), and so have we.
"""

from __future__ import annotations

from typing import Literal

from hubert_ray.config.values import Count, Probability, Settings, Share


class ModelSize(Settings, frozen=True, kw_only=True):
    """The architecture of one HuBERT encoder with its prediction head. Shapes only; nothing about a run."""

    conv_channels: Count = 512  # conv_feature_layers, channels of each of the 7 layers
    conv_norm: Literal["group", "layer"]  # extractor_mode: default (GroupNorm after conv 0) | layer_norm (after each)
    conv_bias: bool = False  # conv_bias: none in the paper's models; foreign ones have it
    layers: Count  # encoder_layers
    dim: Count  # encoder_embed_dim
    ffn_dim: Count  # encoder_ffn_embed_dim
    heads: Count  # encoder_attention_heads
    norm_first: bool  # layer_norm_first: False = post-norm (Base), True = pre-norm (Large, X-Large)
    position_kernel: Count = 128  # conv_pos, taps of the positional convolution
    position_groups: Count = 16  # conv_pos_groups
    codeword_dim: Count  # final_dim, width of the projection and of the codeword table
    normalize_waveform: bool  # normalize: zero mean, unit variance over each whole utterance
    conv_grad_scale: Share  # feature_grad_mult, scale of the gradient that enters the conv encoder
    dropout: Probability  # dropout, after attention, after the FFN and on the encoder's input
    attention_dropout: Probability  # attention_dropout, on attention weights
    activation_dropout: Probability = 0.0  # activation_dropout, inside the FFN
    input_dropout: Probability  # dropout_input, after the projection of the conv features
    layer_drop: Probability  # encoder_layerdrop, probability that a whole layer is skipped


TINY = ModelSize(
    conv_channels=64,
    conv_norm="group",
    layers=4,
    dim=192,
    ffn_dim=768,
    heads=4,
    norm_first=True,
    codeword_dim=64,
    normalize_waveform=False,
    conv_grad_scale=1.0,
    dropout=0.0,
    attention_dropout=0.0,
    input_dropout=0.0,
    layer_drop=0.0,
)
"""For laptops and tests. Group norm and pre-norm together: the pair that learns fastest per CPU second."""

BASE = ModelSize(
    conv_norm="group",
    layers=12,
    dim=768,
    ffn_dim=3072,
    heads=12,
    norm_first=False,
    codeword_dim=256,
    normalize_waveform=False,
    conv_grad_scale=0.1,
    dropout=0.1,
    attention_dropout=0.1,
    input_dropout=0.1,
    layer_drop=0.05,
)

LARGE = ModelSize(
    conv_norm="layer",
    layers=24,
    dim=1024,
    ffn_dim=4096,
    heads=16,
    norm_first=True,
    codeword_dim=768,
    normalize_waveform=True,
    conv_grad_scale=1.0,
    dropout=0.0,
    attention_dropout=0.0,
    input_dropout=0.0,
    layer_drop=0.0,
)

XLARGE = ModelSize(
    conv_norm="layer",
    layers=48,
    dim=1280,
    ffn_dim=5120,
    heads=16,
    norm_first=True,
    codeword_dim=1024,
    normalize_waveform=True,
    conv_grad_scale=1.0,
    dropout=0.0,
    attention_dropout=0.0,
    input_dropout=0.0,
    layer_drop=0.0,
)

SIZES: dict[str, ModelSize] = {"tiny": TINY, "base": BASE, "large": LARGE, "xlarge": XLARGE}
