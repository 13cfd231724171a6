"""Our own form: `model.json`, what is needed to build the network again, beside `model.safetensors`."""

from __future__ import annotations

from pathlib import Path

import msgspec
import safetensors.torch

from hubert_ray.config.sizes import ModelSize
from hubert_ray.formats.checkpoint import Checkpoint
from hubert_ray.formats.names import InteropError, State
from hubert_ray.storage import layout


class ModelCard(msgspec.Struct, frozen=True):
    """The content of `model.json`."""

    kind: str  # "hubert" | "ctc" | "encoder": with prediction head, with letter head, or the body alone
    size: ModelSize
    classes: tuple[tuple[str, ...], ...] = ()  # what each codeword stands for, per label stream; for "hubert"
    alphabet: tuple[str, ...] = ()  # what each output stands for; for "ctc"


def read(folder: Path, state: State) -> Checkpoint:
    """The checkpoint of a training stage, or an imported one; `state` is what its file of weights holds."""
    try:
        card = msgspec.json.decode((folder / layout.MODEL_CONFIG).read_bytes(), type=ModelCard)
    except (OSError, msgspec.DecodeError) as error:
        raise InteropError(f"{folder / layout.MODEL_CONFIG}: cannot be read ({error})") from error
    head = _below(state, "head.") or None
    return Checkpoint(
        card.size,
        _below(state, "encoder."),
        prediction=head if card.kind == "hubert" else None,
        classes=card.classes,
        letters=head if card.kind == "ctc" else None,
        alphabet=card.alphabet,
    )


def write(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    """Writes both files into `folder`."""
    head = checkpoint.prediction or checkpoint.letters or {}
    kind = "hubert" if checkpoint.prediction else "ctc" if checkpoint.letters else "encoder"
    card = ModelCard(kind, checkpoint.size, checkpoint.classes, checkpoint.alphabet)
    state = {f"encoder.{name}": value.contiguous() for name, value in checkpoint.encoder.items()}
    state |= {f"head.{name}": value.contiguous() for name, value in head.items()}
    safetensors.torch.save_file(state, folder / layout.MODEL)
    (folder / layout.MODEL_CONFIG).write_bytes(msgspec.json.encode(card))
    return [folder / layout.MODEL, folder / layout.MODEL_CONFIG]


def _below(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
