"""What can a model file hold, whichever tool wrote it? A body, and one of two heads.

Every format's reader returns a `Checkpoint`, every writer takes one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubert_ray.config.sizes import SIZES, ModelSize
from hubert_ray.data.frames import CONV_KERNELS
from hubert_ray.formats.names import InteropError, State
from hubert_ray.model.frontend import Norm

BLANK, SEPARATOR = "<blank>", "|"


@dataclass(frozen=True)
class Checkpoint:
    """A body, and the head that came with it if there was one."""

    size: ModelSize
    encoder: State  # state dict of hubert.Encoder
    prediction: State | None = None  # state dict of hubert.PredictionHead
    classes: tuple[tuple[str, ...], ...] = ()  # what each codeword stands for, per label stream: as many names as rows
    letters: State | None = None  # weight and bias of the recogniser's output layer
    alphabet: tuple[str, ...] = ()  # what each of its rows stands for; BLANK and SEPARATOR among them

    @property
    def fingerprint(self) -> str:
        """What the body computes, whichever file it came in: 16 hex digits of the SHA-256 of its shape and fp32 weights."""
        size = self.size
        digest = hashlib.sha256(repr((size.heads, size.norm_first, size.normalize_waveform, size.conv_norm)).encode())
        for name, value in sorted(self.encoder.items()):
            digest.update(repr((name, tuple(value.shape))).encode())
            digest.update(value.float().numpy().tobytes())
        return digest.hexdigest()[:16]


def size_of(
    encoder: State,
    where: Path,
    heads: int | None = None,
    norm_first: bool | None = None,
    normalize: bool | None = None,
    **training: float | None,
) -> ModelSize:
    """The shape of these weights. What neither they nor the file's settings say is as in the published size of this shape;
    raises InteropError where there is none and the features would depend on it."""
    layers = sum(name.endswith(".qkv.weight") for name in encoder)
    layer_norms = "conv.layers.1.norm_weight" in encoder
    dim, per_group, kernel = encoder["position.weight_v"].shape
    ffn_dim, channels = len(encoder["layers.0.ffn_in.bias"]), encoder["conv.layers.0.weight"].shape[0]
    kernels = tuple(encoder[f"conv.layers.{i}.weight"].shape[2] for i in range(7))
    refuse_unless(where, kernels == tuple(CONV_KERNELS), "conv kernels", kernels, CONV_KERNELS)
    conv_norm: Norm = "layer" if layer_norms else "group"
    shape = (dim, layers, ffn_dim, conv_norm)
    published = {(size.dim, size.layers, size.ffn_dim, size.conv_norm): size for size in SIZES.values()}.get(shape)
    if published:
        heads = published.heads if heads is None else heads
        norm_first = published.norm_first if norm_first is None else norm_first
        normalize = published.normalize_waveform if normalize is None else normalize
    if heads is None or norm_first is None or normalize is None:
        raise InteropError(
            f"{where}: found weights of {layers} blocks {dim} wide, which is no published size, without settings that tell "
            "attention heads, where the norms stand and whether waveforms are normalised; give the folder that has them, "
            "with config.json or model.json beside the weights"
        )
    if heads < 1 or dim % heads:
        raise InteropError(f"{where}: found {heads} attention heads for a width of {dim}, expected a divisor of it")
    plain = {"dropout": 0.0, "attention_dropout": 0.0, "input_dropout": 0.0, "layer_drop": 0.0}
    defaults = {name: getattr(published, name) for name in plain} if published else plain
    defaults["conv_grad_scale"] = published.conv_grad_scale if published else 1.0
    return ModelSize(
        conv_channels=channels,
        conv_norm=conv_norm,
        conv_bias="conv.layers.1.bias" in encoder,
        layers=layers,
        dim=dim,
        ffn_dim=ffn_dim,
        heads=heads,
        norm_first=norm_first,
        position_kernel=kernel,
        position_groups=dim // per_group,
        codeword_dim=published.codeword_dim if published else dim,
        normalize_waveform=normalize,
        **(defaults | {name: float(value) for name, value in training.items() if value is not None}),
    )


def alphabet_of(symbols: Sequence[str], blank: str, head: State, where: Path) -> tuple[str, ...]:
    """Row names of a letter head, letters in capitals; the format's own blank is called BLANK."""
    rows = len(head["weight"])
    if len(symbols) < rows:
        raise InteropError(
            f"{where}: found {len(symbols)} letters for {rows} outputs; expected a name for each, as in Hugging Face's "
            "vocab.json, fairseq's dict.ltr.txt or our labels.txt"
        )
    if blank not in symbols[:rows]:
        raise InteropError(f"{where}: found no row for CTC's blank, expected one called {blank!r}")
    return tuple(
        BLANK if symbol == blank else symbol.upper() if len(symbol) == 1 else symbol for symbol in symbols[:rows]
    )


def refuse_unless(where: Path, fits: bool, name: str, found: Any, expected: Any = "HuBERT's own") -> None:
    if not fits:
        raise InteropError(f"{where}: found {name} {found}, expected {expected}: this is another architecture")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InteropError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InteropError(f"{path}: found a JSON {type(content).__name__}, expected an object")
    return content
