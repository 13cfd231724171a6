"""A folder for torchaudio: `config.json`, the arguments of `torchaudio.models.wav2vec2_model`, and `model.pt` for it.

`labels.txt`, one name a line, tells what the rows of a recogniser's output stand for; `preprocessing.json`, for which those
arguments have no place, whether waveforms are normalised. torchaudio itself keeps no files but bare state dicts; those are
read too (`files.py`), without heads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hubert_ray.data.frames import CONV_KERNELS, CONV_STRIDES
from hubert_ray.formats import names
from hubert_ray.formats.checkpoint import BLANK, Checkpoint, alphabet_of, read_json, refuse_unless, size_of
from hubert_ray.formats.names import State

_BLANK = "-"
_HYPHEN = "<hyphen>"  # a letter that may not look like the blank
_PREPROCESSING = "preprocessing.json"


def read(folder: Path, config: dict[str, Any], state: State) -> Checkpoint:
    """The checkpoint of a folder with these settings and weights."""
    encoder = names.inward(state, "torchaudio")
    sidecar = folder / _PREPROCESSING
    # Without the sidecar as in all published models, which normalise where they have layer norms between the convs.
    layer_norms = config["extractor_mode"] == "layer_norm"
    size = size_of(
        encoder,
        folder,
        heads=config["encoder_num_heads"],
        norm_first=config["encoder_layer_norm_first"],
        normalize=read_json(sidecar)["normalize_waveform"] if sidecar.exists() else layer_norms,
        dropout=config.get("encoder_dropout"),
        attention_dropout=config.get("encoder_attention_dropout"),
        activation_dropout=config.get("encoder_ff_interm_dropout"),
        input_dropout=config.get("encoder_projection_dropout"),
        layer_drop=config.get("encoder_layer_drop"),
    )
    convs = _conv_layers(size.conv_channels)
    found = config.get("extractor_conv_layer_config") or convs
    refuse_unless(folder, found == convs, "extractor_conv_layer_config", found, convs)
    if "aux.weight" not in state:
        return Checkpoint(size, encoder)
    labels = folder / "labels.txt"
    symbols = labels.read_text().split("\n") if labels.exists() else []
    head = {"weight": state["aux.weight"], "bias": state["aux.bias"]}
    alphabet = (_BLANK if symbol == _HYPHEN else symbol for symbol in alphabet_of(symbols, _BLANK, head, folder))
    return Checkpoint(size, encoder, letters=head, alphabet=tuple(alphabet))


def write(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    size = checkpoint.size
    config = {
        "extractor_mode": "group_norm" if size.conv_norm == "group" else "layer_norm",
        "extractor_conv_layer_config": _conv_layers(size.conv_channels),
        "extractor_conv_bias": size.conv_bias,
        "encoder_embed_dim": size.dim,
        "encoder_projection_dropout": size.input_dropout,
        "encoder_pos_conv_kernel": size.position_kernel,
        "encoder_pos_conv_groups": size.position_groups,
        "encoder_num_layers": size.layers,
        "encoder_num_heads": size.heads,
        "encoder_attention_dropout": size.attention_dropout,
        "encoder_ff_interm_features": size.ffn_dim,
        "encoder_ff_interm_dropout": size.activation_dropout,
        "encoder_dropout": size.dropout,
        "encoder_layer_norm_first": size.norm_first,
        "encoder_layer_drop": size.layer_drop,
        "aux_num_out": len(checkpoint.alphabet) or None,
    }
    state = names.outward(checkpoint.encoder, "torchaudio", "parametrized")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / _PREPROCESSING).write_text(json.dumps({"normalize_waveform": size.normalize_waveform}) + "\n")
    written = [folder / "config.json", folder / _PREPROCESSING, folder / "model.pt"]
    if checkpoint.letters is not None:
        state |= {f"aux.{name}": value for name, value in checkpoint.letters.items()}
        labels = ({BLANK: _BLANK, _BLANK: _HYPHEN}.get(symbol, symbol) for symbol in checkpoint.alphabet)
        (folder / "labels.txt").write_text("\n".join(labels))
        written.append(folder / "labels.txt")
    torch.save(state, folder / "model.pt")
    return written


def _conv_layers(channels: int) -> list[list[int]]:
    return [[channels, kernel, stride] for kernel, stride in zip(CONV_KERNELS, CONV_STRIDES, strict=True)]
