"""What is each weight called elsewhere? One HuBERT body in the names of fairseq, Hugging Face and torchaudio, both ways.

Dict to dict, without importing any of them; `files.py` has the files. s3prl's copy of HuBERT has
fairseq's names. wav2vec 2.0 has the same body under the same names, so its encoders are read too.

Our side is the state dict of `hubert.Encoder`. What differs besides names: our q, k and v are one matrix; the positional
conv's weight norm is spelled `weight_g`, `weight_v` or, by newer torch, `parametrizations.weight.original0`, `.original1`
(both are read, either is written). Where an encoder comes without a mask vector (torchaudio's plain models), it becomes
zeros: fine for features, and to be known before fine-tuning. The bias of a conv before GroupNorm is taken out again by that
norm: it is dropped on the way in and written as zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hubert_ray.errors import HubertRayError
from hubert_ray.model.frontend import Norm

Library = Literal["fairseq", "hugging_face", "torchaudio"]
WeightNorm = Literal["parametrized", "legacy"]
State = dict[str, Tensor]


class InteropError(HubertRayError):
    """A foreign checkpoint that is not the HuBERT or wav2vec 2.0 it was taken for, or one that must not be opened."""


@dataclass(frozen=True)
class _Names:
    """What a library calls the parts of the body; `{}` stands for the index of a conv layer or of a block."""

    conv: str
    conv_norm: Mapping[Norm, str]
    projection_norm: str
    projection: str
    mask_vector: str
    position: str
    norm: str
    block: str
    attention: tuple[str, str, str]  # q, k, v
    in_block: Mapping[str, str]  # ours -> theirs
    heads: tuple[str, ...]  # beginnings of what is no part of the body


_QKV_NAMES = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_IN_BLOCK = {
    "attention_norm": "layer_norm",
    "out": "attention.out_proj",
    "ffn_in": "feed_forward.intermediate_dense",
    "ffn_out": "feed_forward.output_dense",
    "ffn_norm": "final_layer_norm",
}
_NAMES: dict[Library, _Names] = {
    "fairseq": _Names(
        conv="feature_extractor.conv_layers.{}.0",
        # Behind the dropout stands the norm; LayerNorm in the middle of two transpositions.
        conv_norm={"group": "feature_extractor.conv_layers.{}.2", "layer": "feature_extractor.conv_layers.{}.2.1"},
        projection_norm="layer_norm",
        projection="post_extract_proj",
        mask_vector="mask_emb",
        position="encoder.pos_conv.0",
        norm="encoder.layer_norm",
        block="encoder.layers.{}",
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        in_block={
            "attention_norm": "self_attn_layer_norm",
            "out": "self_attn.out_proj",
            "ffn_in": "fc1",
            "ffn_out": "fc2",
            "ffn_norm": "final_layer_norm",
        },
        heads=("final_proj.", "label_embs_concat", "quantizer.", "project_q."),
    ),
    "hugging_face": _Names(
        conv="feature_extractor.conv_layers.{}.conv",
        conv_norm=dict.fromkeys(("group", "layer"), "feature_extractor.conv_layers.{}.layer_norm"),
        projection_norm="feature_projection.layer_norm",
        projection="feature_projection.projection",
        mask_vector="masked_spec_embed",
        position="encoder.pos_conv_embed.conv",
        norm="encoder.layer_norm",
        block="encoder.layers.{}",
        attention=_QKV_NAMES,
        in_block=_IN_BLOCK,
        heads=("lm_head.",),
    ),
    "torchaudio": _Names(
        conv="feature_extractor.conv_layers.{}.conv",
        conv_norm=dict.fromkeys(("group", "layer"), "feature_extractor.conv_layers.{}.layer_norm"),
        projection_norm="encoder.feature_projection.layer_norm",
        projection="encoder.feature_projection.projection",
        mask_vector="mask_generator.mask_embedding",
        position="encoder.transformer.pos_conv_embed.conv",
        norm="encoder.transformer.layer_norm",
        block="encoder.transformer.layers.{}",
        attention=_QKV_NAMES,
        in_block=_IN_BLOCK,
        heads=("aux.",),
    ),
}
_GAIN_AND_DIRECTION: dict[WeightNorm, tuple[str, str]] = {
    "legacy": ("weight_g", "weight_v"),
    "parametrized": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
}


def library_of(state: Mapping[str, Tensor]) -> Library:
    """Whose names these are. Raises InteropError for none of the three."""
    # torchaudio's name ends in Hugging Face's, so it is looked for first.
    for library in ("fairseq", "torchaudio", "hugging_face"):
        if any(name.endswith(_NAMES[library].projection + ".weight") for name in state):
            return library  # type: ignore[return-value]  # mypy widens the tuple's literals
    raise InteropError(
        f"weights: found {len(state)} names such as {sorted(state)[:3]}, expected those of a HuBERT or wav2vec 2.0 as "
        "fairseq, s3prl, Hugging Face or torchaudio write it. Distilled students and other speech models differ in their "
        "body and cannot be read"
    )


def outward(encoder_state: Mapping[str, Tensor], library: Library, weight_norm: WeightNorm) -> State:
    """The state dict that `library` loads into its body; torchaudio's plain models have no place for the mask vector."""
    names = _NAMES[library]
    state: State = {}
    for mine, theirs in _pairs(names, *_kind(encoder_state), weight_norm):
        parts = encoder_state[mine].chunk(len(theirs)) if len(theirs) > 1 else (encoder_state[mine],)
        state |= {name: part.clone() for name, part in zip(theirs, parts, strict=True)}
    if "conv.layers.1.bias" in encoder_state and "conv.layers.0.bias" not in encoder_state:
        state[names.conv.format(0) + ".bias"] = torch.zeros_like(encoder_state["conv.layers.1.bias"])
    if library != "torchaudio":
        state[names.mask_vector] = encoder_state["mask_vector"].clone()
    return state


def inward(state: Mapping[str, Tensor], library: Library) -> State:
    """The encoder's state dict from that of a body, or of a model around one, whose head is left out.

    Raises InteropError for a name that is missing and for one that has no place in our body.
    """
    names = _NAMES[library]
    prefix = body_prefix(state, library)
    rest = {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(names.heads)
    }
    block = re.compile(re.escape(names.block).replace(r"\{\}", r"(\d+)") + r"\.")
    layers = len({found[1] for name in rest if (found := block.match(name))})
    conv_norm: Norm = "layer" if names.conv_norm["layer"].format(1) + ".weight" in rest else "group"
    conv_bias = names.conv.format(1) + ".bias" in rest
    weight_norm: WeightNorm = "legacy" if f"{names.position}.weight_g" in rest else "parametrized"
    if conv_norm == "group":
        rest.pop(names.conv.format(0) + ".bias", None)
    ours: State = {}
    for mine, theirs in _pairs(names, layers, conv_norm, conv_bias, weight_norm):
        for name in theirs:
            if name not in rest:
                raise InteropError(
                    f"weights: {prefix}{name} is missing among {len(state)} names in {library}'s spelling; expected a "
                    "whole HuBERT or wav2vec 2.0 encoder. Distilled students lack parts of it and cannot be read"
                )
        ours[mine] = torch.cat([rest.pop(name) for name in theirs])
    # HuBERTPretrainModel of torchaudio keeps the vector outside the body.
    vector = rest.pop(names.mask_vector, state.get(names.mask_vector))
    ours["mask_vector"] = torch.zeros_like(ours["norm.weight"]) if vector is None else vector
    if rest:
        raise InteropError(f"weights: found {len(rest)} names with no place in HuBERT, such as {sorted(rest)[:3]}")
    return ours


def body_prefix(state: Mapping[str, Tensor], library: Library) -> str:
    """What stands before the body's names in a model around it, such as `hubert.`; empty for the body itself."""
    ending = _NAMES[library].position + ".bias"
    found = sorted(name.removesuffix(ending) for name in state if name.endswith(ending))
    if len(found) != 1:
        raise InteropError(
            f"weights: found {len(found)} names that end in {ending}, expected one positional conv with weight norm"
        )
    return found[0]


def _kind(encoder_state: Mapping[str, Tensor]) -> tuple[int, Norm, bool]:
    """(blocks, conv norm, conv bias) of our own state dict."""
    layers = sum(bool(re.fullmatch(r"layers\.\d+\.out\.bias", name)) for name in encoder_state)
    conv_norm: Norm = "layer" if "conv.layers.1.norm_weight" in encoder_state else "group"
    return layers, conv_norm, "conv.layers.1.bias" in encoder_state


def _pairs(
    names: _Names, layers: int, conv_norm: Norm, conv_bias: bool, weight_norm: WeightNorm
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every name of our state dict but the mask vector, with the names whose tensors it is, one after the other."""
    for i in range(7):
        conv, norm = names.conv.format(i), names.conv_norm[conv_norm].format(i)
        yield f"conv.layers.{i}.weight", (f"{conv}.weight",)
        if conv_bias and (conv_norm == "layer" or i > 0):
            yield f"conv.layers.{i}.bias", (f"{conv}.bias",)
        if conv_norm == "layer" or i == 0:
            yield f"conv.layers.{i}.norm_weight", (f"{norm}.weight",)
            yield f"conv.layers.{i}.norm_bias", (f"{norm}.bias",)
    gain, direction = _GAIN_AND_DIRECTION[weight_norm]
    yield "position.weight_g", (f"{names.position}.{gain}",)
    yield "position.weight_v", (f"{names.position}.{direction}",)
    yield "position.bias", (f"{names.position}.bias",)
    for ending in ("weight", "bias"):
        for mine in ("projection_norm", "projection", "norm"):
            yield f"{mine}.{ending}", (f"{getattr(names, mine)}.{ending}",)
        for i in range(layers):
            block = names.block.format(i)
            yield f"layers.{i}.qkv.{ending}", tuple(f"{block}.{part}.{ending}" for part in names.attention)
            for mine, theirs in names.in_block.items():
                yield f"layers.{i}.{mine}.{ending}", (f"{block}.{theirs}.{ending}",)
