"""How do weights get in from, and out to, Hugging Face and torchaudio? Dict to dict, without importing either.

Our side is the state dict of `hubert.Encoder`; the head has no counterpart there. Three things differ besides names:
our q, k and v are one matrix; the positional conv's weight norm is spelled `weight_g`, `weight_v` or, by newer torch,
`parametrizations.weight.original0`, `.original1` (both are read, either is written). torchaudio's encoder has no
mask vector, which then becomes zeros: fine for features, and to be known before fine-tuning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from hubert_ray.errors import HubertRayError

WeightNorm = Literal["parametrized", "legacy"]
State = dict[str, Tensor]


class InteropError(HubertRayError):
    """A state dict that is not the HuBERT it was said to be."""


# Ours -> theirs, below `encoder.` of Hugging Face and `encoder.transformer.` of torchaudio: the two agree there.
_BLOCK = {
    "attention_norm": "layer_norm",
    "out": "attention.out_proj",
    "ffn_in": "feed_forward.intermediate_dense",
    "ffn_out": "feed_forward.output_dense",
    "ffn_norm": "final_layer_norm",
}
_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_GAIN_AND_DIRECTION = {
    "legacy": ("weight_g", "weight_v"),
    "parametrized": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
}
_HUGGING_FACE = {"body": "encoder", "projection": "feature_projection", "mask_vector": "masked_spec_embed"}
_TORCHAUDIO = {
    "body": "encoder.transformer",
    "projection": "encoder.feature_projection",
    "mask_vector": "mask_generator.mask_embedding",
}


def to_hugging_face(encoder_state: Mapping[str, Tensor], weight_norm: WeightNorm = "parametrized") -> State:
    """The state dict of transformers' HubertModel."""
    return _outward(encoder_state, _HUGGING_FACE, weight_norm)


def from_hugging_face(state: Mapping[str, Tensor]) -> State:
    """The encoder's state dict from HubertModel's, or from a model that holds one as `hubert.`."""
    return _inward(_unwrapped(state, "hubert."), _HUGGING_FACE)


def to_torchaudio(encoder_state: Mapping[str, Tensor], weight_norm: WeightNorm = "parametrized") -> State:
    """The state dict of torchaudio's Wav2Vec2Model (hubert_base and so on), which has no mask vector."""
    state = _outward(encoder_state, _TORCHAUDIO, weight_norm)
    del state[_TORCHAUDIO["mask_vector"]]
    return state


def from_torchaudio(state: Mapping[str, Tensor]) -> State:
    """The encoder's state dict from torchaudio's Wav2Vec2Model or HuBERTPretrainModel."""
    return _inward(_unwrapped(state, "wav2vec2."), _TORCHAUDIO)


def _outward(encoder_state: Mapping[str, Tensor], theirs: Mapping[str, str], weight_norm: WeightNorm) -> State:
    gain, direction = _GAIN_AND_DIRECTION[weight_norm]
    state: State = {}
    for name, value in encoder_state.items():
        if found := re.fullmatch(r"layers\.(\d+)\.qkv\.(weight|bias)", name):
            for part, rows in zip(_QKV, value.chunk(3), strict=True):
                state[f"{theirs['body']}.layers.{found[1]}.{part}.{found[2]}"] = rows.clone()
            continue
        if found := re.fullmatch(r"layers\.(\d+)\.(\w+)\.(weight|bias)", name):
            name = f"{theirs['body']}.layers.{found[1]}.{_BLOCK[found[2]]}.{found[3]}"
        elif found := re.fullmatch(r"conv\.layers\.(\d+)\.(norm_)?(weight|bias)", name):
            name = f"feature_extractor.conv_layers.{found[1]}.{'layer_norm' if found[2] else 'conv'}.{found[3]}"
        elif found := re.fullmatch(r"projection(_norm)?\.(weight|bias)", name):
            name = f"{theirs['projection']}.{'layer_norm' if found[1] else 'projection'}.{found[2]}"
        elif found := re.fullmatch(r"position\.(\w+)", name):
            leaf = {"weight_g": gain, "weight_v": direction, "bias": "bias"}[found[1]]
            name = f"{theirs['body']}.pos_conv_embed.conv.{leaf}"
        elif found := re.fullmatch(r"norm\.(weight|bias)", name):
            name = f"{theirs['body']}.layer_norm.{found[1]}"
        elif name == "mask_vector":
            name = theirs["mask_vector"]
        else:
            raise InteropError(f"weights: found {name!r}, expected a name of hubert.Encoder's state dict")
        state[name] = value.clone()
    return state


def _inward(state: Mapping[str, Tensor], theirs: Mapping[str, str]) -> State:
    """Asks for every name that the outward direction writes; refuses what is missing or left over."""
    rest = dict(state)
    body = theirs["body"]
    layers = {int(found[1]) for name in rest if (found := re.match(re.escape(body) + r"\.layers\.(\d+)\.", name))}
    ours: State = {}

    def take(name: str) -> Tensor:
        if name not in rest:
            raise InteropError(f"weights: {name!r} is missing; found {len(state)} names such as {sorted(state)[:3]}")
        return rest.pop(name)

    for ending in ("weight", "bias"):
        for index in sorted(layers):
            block = f"{body}.layers.{index}"
            ours[f"layers.{index}.qkv.{ending}"] = torch.cat([take(f"{block}.{part}.{ending}") for part in _QKV])
            for mine, foreign in _BLOCK.items():
                ours[f"layers.{index}.{mine}.{ending}"] = take(f"{block}.{foreign}.{ending}")
        ours[f"projection.{ending}"] = take(f"{theirs['projection']}.projection.{ending}")
        ours[f"projection_norm.{ending}"] = take(f"{theirs['projection']}.layer_norm.{ending}")
        ours[f"norm.{ending}"] = take(f"{body}.layer_norm.{ending}")
    for index in range(7):
        foreign = f"feature_extractor.conv_layers.{index}"
        ours[f"conv.layers.{index}.weight"] = take(f"{foreign}.conv.weight")
        if f"{foreign}.layer_norm.weight" in rest:
            ours[f"conv.layers.{index}.norm_weight"] = take(f"{foreign}.layer_norm.weight")
            ours[f"conv.layers.{index}.norm_bias"] = take(f"{foreign}.layer_norm.bias")
    position = f"{body}.pos_conv_embed.conv"
    spelling = "legacy" if f"{position}.weight_g" in rest else "parametrized"
    for mine, foreign in zip(("weight_g", "weight_v"), _GAIN_AND_DIRECTION[spelling], strict=True):
        ours[f"position.{mine}"] = take(f"{position}.{foreign}")
    ours["position.bias"] = take(f"{position}.bias")
    width = ours["norm.weight"].shape
    ours["mask_vector"] = rest.pop(theirs["mask_vector"], torch.zeros(width, dtype=ours["norm.weight"].dtype))
    if rest:
        raise InteropError(f"weights: found {len(rest)} names with no place in HuBERT, such as {sorted(rest)[:3]}")
    return ours


def _unwrapped(state: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """The inner model's names if `state` is that of a model around it; a head's are left out."""
    if not any(name.startswith(prefix) for name in state):
        return state
    inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    vector = _TORCHAUDIO["mask_vector"]
    return {**inner, vector: state[vector]} if vector in state else inner
