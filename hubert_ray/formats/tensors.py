"""How is a file of weights opened without running what it may hold?

`.safetensors` is plain data. `.pt` and `.bin` are pickles, which can name any function to be called: they go through
torch's weights-only reader, which builds tensors and plain containers and refuses everything else by name. fairseq stores
a few objects of its own beside the weights (settings, dictionaries); those listed in `_INERT` become records of their
fields, and none of their code is run.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from hubert_ray.formats.names import InteropError


class _Record:
    """Stands in for an object of a foreign class: keeps its fields, runs none of its code."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


_INERT = (
    "argparse.Namespace",
    "fairseq.data.dictionary.Dictionary",
    "fairseq.dataclass.configs.FairseqConfig",
)


def load_tensors(path: Path) -> dict[str, Any]:
    """The dict in a `.safetensors`, `.pt` or `.bin` file. No code that it may hold is run."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([(_Record, name) for name in _INERT]):  # type: ignore[list-item]
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        safetensors.SafetensorError,
        EOFError,
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
    ) as error:
        if found := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error)):
            raise InteropError(
                f"{path}: holds an object of {found[1]}, which is not known to be plain data; expected tensors, numbers, "
                "texts and plain containers. Save its state dict with the tool that wrote it, and read that"
            ) from None
        raise InteropError(f"{path}: not a checkpoint, or a damaged one{_reason(error)}") from error
    if not isinstance(content, dict):
        raise InteropError(f"{path}: holds a {type(content).__name__}, expected a dict of weights")
    return content


def fields_of(record: Any) -> dict[str, Any]:
    """Settings as a plain dict, whichever object they were stored as."""
    if isinstance(record, _Record):
        return {name: value for name, value in vars(record).items() if name != "arguments"}
    return dict(record) if isinstance(record, Mapping) else {}


def _reason(error: Exception) -> str:
    """What went wrong, in brackets; without torch's advice to open the file with `weights_only=False`, which runs code."""
    text = str(error)
    found = re.search(r"WeightsUnpickler error: (.+)", text)
    if found or "weights_only" not in text:
        return f" ({found[1] if found else (text or 'it ends too early').splitlines()[0]})"
    return ""
