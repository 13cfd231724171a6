"""How is a trained model used from a notebook? `hubert_ray.load`, for our models and anybody's.

    model = hubert_ray.load("storage/runs/demo/iter2/pretrain")     # or a fairseq .pt, a Hugging Face folder, s3://…
    features_TD = model.extract(wave, layer=9)
    text = hubert_ray.load("storage/runs/demo/finetune/pretrained").transcribe(wave)

Waveforms of other rates are resampled where `sample_rate` says so: `model.extract(wave, sample_rate=44_100)`.
Needs torch, not Ray. Notation: S samples, T frames at 50 Hz, D width.
"""

from __future__ import annotations

import hashlib
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from pyarrow import fs
from torch import Tensor

from hubert_ray.asr import letters
from hubert_ray.asr.decoder import greedy
from hubert_ray.config.sizes import ModelSize
from hubert_ray.data.audio import MAX_FILTER_TAPS, normalise
from hubert_ray.data.frames import RECEPTIVE_FIELD, SAMPLE_RATE
from hubert_ray.errors import HubertRayError, RecipeError, StaleArtifactError, StorageError
from hubert_ray.formats import files
from hubert_ray.formats.checkpoint import Checkpoint
from hubert_ray.formats.names import InteropError, State
from hubert_ray.model.ctc import HubertCtc
from hubert_ray.model.hubert import Encoder, Hubert, InputError
from hubert_ray.storage import layout
from hubert_ray.storage.artifacts import Artifact, Identity
from hubert_ray.storage.filesystem import Storage

MAX_PEAK = 10.0  # some recordings clip a little above 1; integers that were only cast to float lie far above
_SCHEMES = ("s3", "gs", "file")

Module = TypeVar("Module", bound=torch.nn.Module)


class SpeechModel:
    """A HuBERT or wav2vec 2.0 in eval mode, with the head that it came with."""

    def __init__(self, checkpoint: Checkpoint, device: str | torch.device = "cpu"):
        self.checkpoint = checkpoint
        self.size: ModelSize = checkpoint.size
        with torch.device(
            "meta"
        ):  # shapes only: no time, and none of the user's random numbers, for weights to be replaced
            encoder = Encoder(self.size)
        encoder = _loaded(encoder, checkpoint.encoder).eval()
        try:
            self.device = torch.device(device)
            self.encoder = encoder.to(self.device)
        except (RuntimeError, AssertionError) as error:  # the second: a torch without CUDA
            raise InputError(f"device '{device}' cannot be used: {error}") from error

    def extract(self, wave: np.ndarray | Tensor, layer: int | None = None, *, sample_rate: int = SAMPLE_RATE) -> Tensor:
        """features_TD of one waveform, (S,) mono in [-1, 1]; it is resampled to 16 kHz where it has another `sample_rate`.

        `layer` counts from 1 and is taken after the block's residual, in post-norm models after its norm, as fairseq's
        `extract_features(output_layer=...)`; 0 is the input of the first block, None the encoder's output (in pre-norm
        models after its last norm). Raises InputError for another shape, integers, too short audio, or a layer that is not
        there.
        """
        if layer is not None and not isinstance(layer, int | np.integer):
            raise InputError(f"layer: found {layer!r}, expected a whole number from 0 to {self.size.layers}, or None")
        return self.encoder.features(self._prepared(wave, sample_rate), layer)[0]

    def extract_all(self, wave: np.ndarray | Tensor, *, sample_rate: int = SAMPLE_RATE) -> list[Tensor]:
        """features_TD of every layer from one pass; entry i is `extract(wave, layer=i)`."""
        return [hidden_1TD[0] for hidden_1TD in self.encoder.all_layers(self._prepared(wave, sample_rate))]

    def transcribe(self, wave: np.ndarray | Tensor, *, sample_rate: int = SAMPLE_RATE) -> str:
        """The most probable letters of a fine-tuned model, without a language model. Capitals, as in LibriSpeech."""
        recogniser = self.recogniser()
        wave_1S = self._prepared(wave, sample_rate)
        with torch.no_grad():
            log_probs_1TV, _ = recogniser(wave_1S, torch.tensor([wave_1S.shape[1]]))
        return greedy(log_probs_1TV[0].cpu())

    def pretraining_model(self) -> Hubert:
        """A new model with the prediction head, to look into its codewords or to train on; what `save` writes stays as read."""
        if self.checkpoint.prediction is None:
            raise InputError("pretraining model: these weights came without a prediction head")
        with torch.device("meta"):
            model = Hubert(self.size, tuple(map(len, self.checkpoint.classes)))
        _loaded(model.encoder, self.checkpoint.encoder)
        _loaded(model.head, self.checkpoint.prediction)
        return model.eval().to(self.device)

    def recogniser(self) -> HubertCtc:
        """The fine-tuned model, its outputs reduced to our 29 symbols and put into their order; one object, made once."""
        return self._recogniser

    @cached_property
    def _recogniser(self) -> HubertCtc:
        if self.checkpoint.letters is None:
            raise InputError("recogniser: these weights came without a letter head; fine-tune them first")
        missing = [symbol for symbol in letters.ALPHABET if symbol not in self.checkpoint.alphabet]
        if missing:
            raise InteropError(
                f"alphabet: found {' '.join(self.checkpoint.alphabet)}, expected all of {' '.join(letters.ALPHABET)}; "
                f"missing {' '.join(missing)}"
            )
        rows = torch.tensor([self.checkpoint.alphabet.index(symbol) for symbol in letters.ALPHABET])
        with torch.device("meta"):
            model = HubertCtc(self.size, len(rows))
        model.encoder = self.encoder
        _loaded(model.head, {name: value[rows] for name, value in self.checkpoint.letters.items()})
        return model.eval().to(self.device)

    def save(self, kind: str, folder: str | Path) -> list[Path]:
        """Writes the model for another tool: "hugging_face", "fairseq", "s3prl", "torchaudio", or our own "hubert_ray".

        Returns the files. Raises InteropError where `folder` holds anything already or cannot be written.
        """
        return files.write(self.checkpoint, kind, folder)

    def store(self, storage: Storage, name: str) -> str:
        """Seals the model on `storage` as run and iteration `name` ("public/base"), so that recipes can name it as a teacher:
        `teacher = {kind = "layer", of = "public/base", layer = 9}`. Returns its folder there."""
        path = path_of(name)
        if found := storage.list(path, recursive=True):
            raise StaleArtifactError(
                f"{path} in {storage.url}: found {len(found)} files, such as {found[0]}, expected none; give the model "
                f"another name, or remove that one: hubert-ray remove {path} --storage '{storage.url}'"
            )
        with tempfile.TemporaryDirectory() as folder:
            digests = {}
            for file in self.save("hubert_ray", folder):
                with file.open("rb") as content:
                    digests[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
            storage.upload(Path(folder), path)
        Artifact(storage, path, Identity("import", digests, {})).seal({"seconds": 0.0})
        return path

    def _prepared(self, wave: np.ndarray | Tensor, sample_rate: int = SAMPLE_RATE) -> Tensor:
        """wave_1S on the model's device, at 16 kHz, normalised where the model wants it."""
        wave_S = prepared_wave(wave, sample_rate)
        if len(wave_S) < RECEPTIVE_FIELD:
            raise InputError(
                f"waveform: found shape ({len(wave_S)},), expected (samples,) with at least {RECEPTIVE_FIELD} of them at 16 kHz"
            )
        wave_S = normalise(wave_S) if self.size.normalize_waveform else wave_S
        return torch.from_numpy(np.ascontiguousarray(wave_S))[None].to(self.device)


def prepared_wave(wave: np.ndarray | Tensor, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """wave_S float32 at 16 kHz of what a user holds. Raises InputError where that is no mono waveform in [-1, 1]."""
    if isinstance(wave, Tensor):  # numpy knows no bfloat16
        wave = wave.detach().cpu()
        wave = (wave.float() if wave.is_floating_point() else wave).numpy()
    wave_S = np.asarray(wave)
    if wave_S.ndim != 1:
        raise InputError(f"waveform: found shape {wave_S.shape}, expected (samples,), mono in [-1, 1]")
    if wave_S.dtype.kind != "f":
        raise InputError(f"waveform: found {wave_S.dtype} samples, expected floats in [-1, 1]; divide int16 by 32768")
    wave_S = wave_S.astype(np.float32)
    if not np.isfinite(wave_S).all():
        raise InputError("waveform: found NaN or infinite samples")
    if (peak := np.abs(wave_S).max(initial=0.0)) >= MAX_PEAK:
        raise InputError(f"waveform: found a peak of {peak:g}, expected samples in [-1, 1]; divide int16 by 32768")
    return _at_16_khz(wave_S, sample_rate)


def path_of(name: str) -> str:
    """The folder of an imported model called <run>/<iteration>, such as public/base. Raises RecipeError for other names."""
    part = "[A-Za-z0-9][A-Za-z0-9_.-]*"  # as in recipes, which have to name it
    if not re.fullmatch(f"{part}/{part}", name):
        raise RecipeError(
            f"'{name}': give a name of the form <run>/<iteration>, such as public/base; both of letters, digits, '_', '-' and "
            "'.', beginning with one of the first two"
        )
    run, iteration = name.split("/")
    return layout.artifact(run, f"{iteration}/pretrain")


def load(path: str | Path, device: str | torch.device = "cpu") -> SpeechModel:
    """A model of ours, fairseq's, s3prl's, Hugging Face's or torchaudio's, from a file or folder.

    `path` may be an s3:// or gs:// URL; it is copied to a temporary folder first. No pickled code is run.
    Raises InteropError where there is no such model, StorageError where the place cannot be reached.
    """
    with fetched(path) as file:
        return SpeechModel(files.read(file), device)


@contextmanager
def fetched(path: str | Path) -> Iterator[Path]:
    """A file or folder on this machine: itself, or where `path` is a URL a copy that lasts as long as the block.

    Errors of the block that name the copy are made to name the URL.
    """
    text = str(path)
    if "://" not in text:
        yield Path(text)
        return
    url, _, query = text.partition("?")
    scheme, _, place = url.rstrip("/").partition("://")
    parent, _, name = place.rpartition("/")
    if scheme not in _SCHEMES or not name or not parent:
        raise InteropError(
            f"{text}: expected a path, s3://bucket/model or gs://bucket/model; download other models first"
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            copied = _copied(Storage(f"{scheme}://{parent}{'?' + query if query else ''}"), name, Path(folder))
        except (StorageError, OSError) as error:
            raise StorageError(f"{text}: cannot be reached ({error.__cause__ or error})") from error
        if not copied:
            raise InteropError(f"{text}: found neither a file nor a folder")
        try:
            yield Path(folder) / name
        except HubertRayError as error:
            raise type(error)(
                str(error).replace(f"{folder}/{name}", url).replace(folder, f"{scheme}://{parent}")
            ) from error


def _copied(storage: Storage, name: str, folder: Path) -> bool:
    """Copies a model from storage: the files directly in a folder (training checkpoints lie deeper), or a file with the
    settings and dictionaries beside it. False where there is none."""
    kind = storage.filesystem.get_file_info(storage.full(name)).type
    if kind == fs.FileType.File:
        wanted = [name, *(file for file in storage.list("") if file != name and file.endswith((".json", ".txt")))]
    else:
        wanted = [f"{name}/{file}" for file in storage.list(name)] if kind == fs.FileType.Directory else []
    for file in wanted:
        copy = folder / file
        copy.parent.mkdir(exist_ok=True)
        fs.copy_files(
            storage.full(file),
            str(copy),
            source_filesystem=storage.filesystem,
            destination_filesystem=fs.LocalFileSystem(),
        )
    return bool(wanted)


def _at_16_khz(wave_S: np.ndarray, sample_rate: int) -> np.ndarray:
    if sample_rate == SAMPLE_RATE:
        return wave_S
    if not isinstance(sample_rate, Real) or sample_rate % 1 or sample_rate < 1:
        raise InputError(f"sample_rate: found {sample_rate!r}, expected whole Hz, such as 44100")
    sample_rate = int(sample_rate)
    common = math.gcd(sample_rate, SAMPLE_RATE)
    if (sample_rate // common) * (SAMPLE_RATE // common) > MAX_FILTER_TAPS:
        raise InputError(f"sample_rate: found {sample_rate} Hz, too odd to resample to 16 kHz; give a usual rate")
    import torchaudio.functional  # here, because few need it

    return torchaudio.functional.resample(torch.from_numpy(wave_S), sample_rate, SAMPLE_RATE).numpy()


def _loaded(module: Module, state: State) -> Module:
    """`module`, made on the meta device, with fp32 copies of these weights."""
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        some = ", ".join(
            f"{name} (found {found.get(name, 'none')}, expected {wanted.get(name, 'none')})" for name in wrong[:3]
        )
        raise InteropError(f"weights do not fit the settings that came with them: {len(wrong)} differ, such as {some}")
    module.load_state_dict({name: value.to(torch.float32, copy=True) for name, value in state.items()}, assign=True)
    return module
