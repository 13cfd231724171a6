"""Which format is this? Reads any of them, writes the one asked for.

    read(Path("hubert_base_ls960.pt"))                      -> Checkpoint
    write(checkpoint, "hugging_face", Path("my_hubert"))    -> the files written

Extension point: a new format is a file with `read` and `write`, named here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from hubert_ray.formats import fairseq, hugging_face, names, native, torchaudio
from hubert_ray.formats.checkpoint import Checkpoint, read_json, size_of
from hubert_ray.formats.names import InteropError
from hubert_ray.formats.tensors import load_tensors
from hubert_ray.storage import layout

WRITERS: dict[str, Callable[[Checkpoint, Path], list[Path]]] = {
    "hugging_face": hugging_face.write,
    "fairseq": fairseq.write,
    "s3prl": fairseq.write_s3prl,
    "torchaudio": torchaudio.write,
    "hubert_ray": native.write,
}


def read(path: Path) -> Checkpoint:
    """A checkpoint of any of the formats, recognised by what is in it.

    Raises InteropError where it is none of them, is damaged, holds another architecture, or holds code.
    """
    if path.is_dir():
        if (path / layout.MODEL_CONFIG).exists():
            return native.read(path)
        if not (path / "config.json").exists():
            raise InteropError(
                f"{path}: found neither {layout.MODEL_CONFIG} nor config.json, expected a folder of ours, of Hugging Face "
                "or of torchaudio; files (.pt, .bin, .safetensors) are named themselves"
            )
        config = read_json(path / "config.json")
        return (torchaudio if "extractor_mode" in config else hugging_face).read(path, config)
    if not path.is_file():
        raise InteropError(f"{path}: found neither a file nor a folder")
    content = load_tensors(path)
    return fairseq.read(content, path) if fairseq.holds(content) else _read_bare(content, path)


def write(checkpoint: Checkpoint, kind: str, folder: Path) -> list[Path]:
    """Writes the checkpoint into `folder`, which is made; returns the files. `kind` is one of WRITERS."""
    folder.mkdir(parents=True, exist_ok=True)
    return WRITERS[kind](checkpoint, folder)


def _read_bare(state: dict[str, Any], path: Path) -> Checkpoint:
    """A state dict without settings: what shapes do not tell is taken from the published sizes."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    encoder = names.inward(tensors, names.library_of(tensors))
    return Checkpoint(size_of(encoder, path), encoder)
