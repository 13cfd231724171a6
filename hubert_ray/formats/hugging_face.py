"""A Hugging Face folder: `config.json`, `preprocessor_config.json`, `model.safetensors`; `vocab.json` for a recogniser.

Read: HubertModel, HubertForCTC and their wav2vec 2.0 twins, with or without conv bias, post-norm or "stable" pre-norm.
Source: transformers `models/hubert/configuration_hubert.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch

from hubert_ray.data.frames import CONV_KERNELS, CONV_STRIDES, SAMPLE_RATE
from hubert_ray.formats import names
from hubert_ray.formats.checkpoint import BLANK, SEPARATOR, Checkpoint, alphabet_of, read_json, refuse_unless, size_of
from hubert_ray.formats.names import InteropError, State
from hubert_ray.model.frontend import NORM_EPS

_BLANK = "<pad>"


def read(folder: Path, config: dict[str, Any], state: State) -> Checkpoint:
    """The checkpoint of a folder with these settings and weights."""
    kind = config.get("model_type")
    if kind not in ("hubert", "wav2vec2"):
        raise InteropError(f"{folder}: found model_type {kind!r}, expected 'hubert' or 'wav2vec2'")
    for name, expected in (
        ("hidden_act", "gelu"),
        ("feat_extract_activation", "gelu"),
        ("feat_proj_layer_norm", True),
        ("conv_pos_batch_norm", False),
        ("conv_kernel", list(CONV_KERNELS)),
        ("conv_stride", list(CONV_STRIDES)),
        ("layer_norm_eps", NORM_EPS),
        ("add_adapter", False),
        ("adapter_attn_dim", None),
    ):
        found = config.get(name, expected)
        refuse_unless(folder, found == expected, name, found, expected)
    refuse_unless(folder, len(set(config.get("conv_dim", [512]))) == 1, "conv_dim", config.get("conv_dim"))
    preprocessing = folder / "preprocessor_config.json"
    # Without that file as in all published models, which normalise where they have layer norms between the convs.
    layer_norms = config.get("feat_extract_norm", "group") == "layer"
    encoder = names.inward(state, "hugging_face")
    size = size_of(
        encoder,
        folder,
        heads=config.get("num_attention_heads", 12),
        norm_first=config.get("do_stable_layer_norm", False),
        normalize=read_json(preprocessing).get("do_normalize", True) if preprocessing.exists() else layer_norms,
        dropout=config.get("hidden_dropout"),
        attention_dropout=config.get("attention_dropout"),
        activation_dropout=config.get("activation_dropout"),
        input_dropout=config.get("feat_proj_dropout"),
        layer_drop=config.get("layerdrop"),
    )
    if "lm_head.weight" not in state:
        return Checkpoint(size, encoder)
    vocabulary: dict[str, int] = {}
    for name in ("vocab.json", "added_tokens.json"):
        vocabulary |= read_json(folder / name) if (folder / name).exists() else {}
    by_row = {row: symbol for symbol, row in vocabulary.items()}
    head = {"weight": state["lm_head.weight"], "bias": state["lm_head.bias"]}
    # The blank is the padding's row, whatever that is called: "<pad>" in published models, often "[PAD]" in others.
    blank = by_row.get(config.get("pad_token_id", 0), _BLANK)
    symbols = [by_row.get(row, f"<row {row}>") for row in range(len(head["weight"]))]
    return Checkpoint(size, encoder, letters=head, alphabet=alphabet_of(symbols, blank, head, folder))


def write(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    size = checkpoint.size
    config = {
        "model_type": "hubert",
        "architectures": ["HubertModel" if checkpoint.letters is None else "HubertForCTC"],
        "hidden_size": size.dim,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.ffn_dim,
        "conv_dim": [size.conv_channels] * 7,
        "conv_kernel": list(CONV_KERNELS),
        "conv_stride": list(CONV_STRIDES),
        "num_feat_extract_layers": 7,
        "conv_bias": size.conv_bias,
        "feat_extract_norm": size.conv_norm,
        "feat_extract_activation": "gelu",
        "feat_proj_layer_norm": True,
        "hidden_act": "gelu",
        "do_stable_layer_norm": size.norm_first,
        "num_conv_pos_embeddings": size.position_kernel,
        "num_conv_pos_embedding_groups": size.position_groups,
        "hidden_dropout": size.dropout,
        "attention_dropout": size.attention_dropout,
        "activation_dropout": size.activation_dropout,
        "feat_proj_dropout": size.input_dropout,
        "layerdrop": size.layer_drop,
        "layer_norm_eps": NORM_EPS,
    }
    preprocessing = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "padding_value": 0.0,
        "do_normalize": size.normalize_waveform,
        "return_attention_mask": size.conv_norm == "layer",
    }
    state = names.outward(checkpoint.encoder, "hugging_face", "parametrized")
    texts: dict[str, Any] = {"config.json": config, "preprocessor_config.json": preprocessing}
    if checkpoint.letters is not None:
        state = {f"hubert.{name}": value for name, value in state.items()}
        state |= {f"lm_head.{name}": value for name, value in checkpoint.letters.items()}
        config |= {"vocab_size": len(checkpoint.alphabet), "pad_token_id": checkpoint.alphabet.index(BLANK)}
        texts["vocab.json"] = _vocabulary(checkpoint.alphabet)
        texts["tokenizer_config.json"] = {
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "pad_token": _BLANK,
            "word_delimiter_token": SEPARATOR,
        }
    safetensors.torch.save_file(
        {name: value.contiguous() for name, value in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    for name, text in texts.items():
        (folder / name).write_text(json.dumps(text, indent=2) + "\n")
    return [folder / "model.safetensors", *(folder / name for name in texts)]


def _vocabulary(alphabet: tuple[str, ...]) -> dict[str, int]:
    """A name for every row. The blank's is taken: fairseq's own `<pad>`, a row that never wins, gets another."""
    rows = {_BLANK: alphabet.index(BLANK)}
    for row, symbol in enumerate(alphabet):
        if symbol != BLANK:
            rows[symbol if symbol not in rows else f"<row-{row}>"] = row
    return rows
