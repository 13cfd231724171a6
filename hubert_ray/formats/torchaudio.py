"""A folder for torchaudio: `config.json`, the arguments of `torchaudio.models.wav2vec2_model`, and `model.pt` for it.

`labels.txt`, one name a line, tells what the rows of a recogniser's output stand for. torchaudio itself keeps no files but
bare state dicts; those are read too (`files.py`), without heads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hubert_ray.data.frames import CONV_KERNELS, CONV_STRIDES
from hubert_ray.formats import names
from hubert_ray.formats.checkpoint import BLANK, Checkpoint, alphabet_of, size_of
from hubert_ray.formats.tensors import load_tensors

_BLANK = "-"


def read(folder: Path, config: dict[str, Any]) -> Checkpoint:
    state = load_tensors(folder / "model.pt")
    encoder = names.inward(state, "torchaudio")
    size = size_of(
        encoder,
        folder,
        heads=config["encoder_num_heads"],
        norm_first=config["encoder_layer_norm_first"],
        dropout=config.get("encoder_dropout"),
        attention_dropout=config.get("encoder_attention_dropout"),
        activation_dropout=config.get("encoder_ff_interm_dropout"),
        input_dropout=config.get("encoder_projection_dropout"),
        layer_drop=config.get("encoder_layer_drop"),
    )
    if "aux.weight" not in state:
        return Checkpoint(size, encoder)
    symbols = (folder / "labels.txt").read_text().split("\n") if (folder / "labels.txt").exists() else []
    head = {"weight": state["aux.weight"], "bias": state["aux.bias"]}
    return Checkpoint(size, encoder, letters=head, alphabet=alphabet_of(symbols, _BLANK, head, folder))


def write(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    size = checkpoint.size
    config = {
        "extractor_mode": "group_norm" if size.conv_norm == "group" else "layer_norm",
        "extractor_conv_layer_config": [
            [size.conv_channels, kernel, stride] for kernel, stride in zip(CONV_KERNELS, CONV_STRIDES, strict=True)
        ],
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
    written = [folder / "config.json", folder / "model.pt"]
    if checkpoint.letters is not None:
        state |= {f"aux.{name}": value for name, value in checkpoint.letters.items()}
        labels = (_BLANK if symbol == BLANK else symbol for symbol in checkpoint.alphabet)
        (folder / "labels.txt").write_text("\n".join(labels))
        written.append(folder / "labels.txt")
    torch.save(state, folder / "model.pt")
    return written
