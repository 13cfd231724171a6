"""Which format is this? Reads any of them, writes the one asked for.

    read(Path("hubert_base_ls960.pt"))                      -> Checkpoint
    write(checkpoint, "hugging_face", Path("my_hubert"))    -> the files written

Extension point: a new format is a file with `read` and `write`, named here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from hubert_ray.errors import HubertRayError
from hubert_ray.formats import fairseq, hugging_face, names, native, torchaudio
from hubert_ray.formats.checkpoint import Checkpoint, read_json, refuse_unless, size_of
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
_WEIGHTS = (layout.MODEL, "model.pt", "pytorch_model.bin")  # in a folder, beside their settings
_SETTINGS = (layout.MODEL_CONFIG, "config.json")


def read(path: Path) -> Checkpoint:
    """A checkpoint of any of the formats, recognised by what is in it. `~` is expanded.

    Raises InteropError where it is none of them, is damaged, holds another architecture, or holds code.
    """
    path = path.expanduser()
    try:
        checkpoint = _read(path)
        _refuse_odd_heads(checkpoint, path)
    except HubertRayError:
        raise
    except (
        Exception
    ) as error:  # a damaged file can fail anywhere: a key that is missing, a number where a table was meant
        what = f"{error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise InteropError(f"{path}: damaged or incomplete: {what}; copy or download it again") from error
    return checkpoint


def write(checkpoint: Checkpoint, kind: str, folder: str | Path) -> list[Path]:
    """Writes the checkpoint into `folder`, which is made, and returns the files. `kind` is one of WRITERS.

    Raises InteropError for a folder that holds anything or cannot be written, and leaves nothing behind then.
    """
    if kind not in WRITERS:
        raise InteropError(f"format: found {kind!r}, expected one of {', '.join(WRITERS)}")
    if re.match(r"\w+:/", str(folder)):
        raise InteropError(f"{folder}: models are exported to local folders; give one, and copy it there afterwards")
    folder = Path(folder).expanduser()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "a folder with files in it" if folder.is_dir() else "a file"
            raise InteropError(f"{folder}: found {what}, expected a new or empty folder; give another one")
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return WRITERS[kind](checkpoint, folder)
        except BaseException:
            for file in folder.iterdir():
                file.unlink()
            for place in made:
                place.rmdir()
            raise
    except (
        OSError,
        RuntimeError,
        safetensors.SafetensorError,
    ) as error:  # the last two: how torch and safetensors say it
        raise InteropError(f"{folder}: cannot be written ({error}); give another folder") from error


def _read(path: Path) -> Checkpoint:
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise InteropError(
            f"{path}: found neither a file nor a folder; a model that is only on the Hugging Face hub: download it first"
        )
    content = load_tensors(path)
    if fairseq.holds(content):
        return fairseq.read(content, path)
    if path.name in _WEIGHTS and any((path.parent / name).exists() for name in _SETTINGS):
        return _read_folder(path.parent, content)
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    encoder = names.inward(tensors, names.library_of(tensors))
    return Checkpoint(size_of(encoder, path), encoder)


def _read_folder(folder: Path, content: dict[str, Any] | None = None) -> Checkpoint:
    """The checkpoint of a folder with settings; `content` is that of the file of weights where one was named."""
    unfinished = (folder / layout.CLAIM).exists() and not (folder / layout.SEAL).exists()
    way_out = (
        "this training run is not finished; run its command again" if unfinished else "name another folder, or a file"
    )
    if not any((folder / name).exists() for name in _SETTINGS):
        if (folder / "model.pt").exists():
            return _read(folder / "model.pt")  # fairseq's and s3prl's files hold their settings
        raise InteropError(
            f"{folder}: found neither {' nor '.join(_SETTINGS)}, expected a folder of ours, of Hugging Face or of torchaudio; "
            + way_out
        )
    if content is None:
        weights = [folder / name for name in _WEIGHTS if (folder / name).exists()]
        if not weights:
            raise InteropError(f"{folder}: found settings but no weights, expected {' or '.join(_WEIGHTS)}; {way_out}")
        content = load_tensors(weights[0])
    if (folder / layout.MODEL_CONFIG).exists():
        return native.read(folder, content)
    config = read_json(folder / "config.json")
    return (torchaudio if "extractor_mode" in config else hugging_face).read(folder, config, content)


def _refuse_odd_heads(checkpoint: Checkpoint, path: Path) -> None:
    """A head that does not fit its body or its names would fail far from here, or worse, not fail."""
    size = checkpoint.size
    if checkpoint.letters is not None:
        shapes = {name: tuple(value.shape) for name, value in checkpoint.letters.items()}
        rows = len(checkpoint.alphabet)
        expected = {"weight": (rows, size.dim), "bias": (rows,)}
        refuse_unless(path, shapes == expected, "letter head", shapes, expected)
    if checkpoint.prediction is not None:
        shapes = {name: tuple(value.shape) for name, value in checkpoint.prediction.items()}
        width, rows = size.codeword_dim * len(checkpoint.classes), sum(map(len, checkpoint.classes))
        expected = {
            "projection.weight": (width, size.dim),
            "projection.bias": (width,),
            "codewords": (rows, size.codeword_dim),
        }
        refuse_unless(path, shapes == expected, "prediction head", shapes, expected)
