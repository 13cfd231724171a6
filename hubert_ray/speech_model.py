"""How is a trained model used from a notebook? `hubert_ray.load`, for our models and anybody's.

    model = hubert_ray.load("storage/runs/demo/iter2/pretrain")     # or a fairseq .pt, a Hugging Face folder, s3://…
    features_TD = model.extract(wave, layer=9)
    text = hubert_ray.load("storage/runs/demo/finetune/pretrained").transcribe(wave)

Needs torch, not Ray. Notation: S samples at 16 kHz, T frames at 50 Hz, D width.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from pyarrow import fs
from torch import Tensor

from hubert_ray.asr import letters
from hubert_ray.asr.decoder import greedy
from hubert_ray.config.sizes import ModelSize
from hubert_ray.data.audio import normalise
from hubert_ray.errors import StaleArtifactError
from hubert_ray.formats import files
from hubert_ray.formats.checkpoint import Checkpoint
from hubert_ray.formats.names import InteropError, State
from hubert_ray.model.ctc import HubertCtc
from hubert_ray.model.hubert import Encoder, Hubert, InputError
from hubert_ray.storage import layout
from hubert_ray.storage.artifacts import Artifact, Identity
from hubert_ray.storage.filesystem import Storage

Module = TypeVar("Module", bound=torch.nn.Module)


class SpeechModel:
    """A HuBERT or wav2vec 2.0 in eval mode, with the head that it came with."""

    def __init__(self, checkpoint: Checkpoint, device: str | torch.device = "cpu"):
        self.checkpoint = checkpoint
        self.size: ModelSize = checkpoint.size
        self.device = torch.device(device)
        self.encoder = _loaded(Encoder(self.size), checkpoint.encoder).eval().to(self.device)

    def extract(self, wave: np.ndarray | Tensor, layer: int | None = None) -> Tensor:
        """features_TD of one waveform, (S,) mono at 16 kHz in [-1, 1].

        `layer` counts from 1 and is taken after the block's residual, in post-norm models after its norm, as fairseq's
        `extract_features(output_layer=...)`; 0 is the input of the first block, None the encoder's output (in pre-norm
        models after its last norm). Raises InputError for another shape, too short audio, or a layer that is not there.
        """
        return self.encoder.features(self._prepared(wave), layer)[0]

    def extract_all(self, wave: np.ndarray | Tensor) -> list[Tensor]:
        """features_TD of every layer from one pass; entry i is `extract(wave, layer=i)`."""
        return [hidden_1TD[0] for hidden_1TD in self.encoder.all_layers(self._prepared(wave))]

    def transcribe(self, wave: np.ndarray | Tensor) -> str:
        """The most probable letters of a fine-tuned model, without a language model. Capitals, as in LibriSpeech."""
        recogniser = self.recogniser()
        wave_1S = self._prepared(wave)
        with torch.no_grad():
            log_probs_1TV, _ = recogniser(wave_1S, torch.tensor([wave_1S.shape[1]]))
        return greedy(log_probs_1TV[0].cpu())

    def pretraining_model(self) -> Hubert:
        """The model with its prediction head, to look into its codewords or to train on."""
        if self.checkpoint.prediction is None:
            raise InputError("pretraining model: these weights came without a prediction head")
        model = Hubert(self.size, tuple(map(len, self.checkpoint.classes)))
        model.encoder = self.encoder
        _loaded(model.head, self.checkpoint.prediction)
        return model.eval().to(self.device)

    def recogniser(self) -> HubertCtc:
        """The fine-tuned model, its outputs reduced to our 29 symbols and put into their order."""
        if self.checkpoint.letters is None:
            raise InputError("recogniser: these weights came without a letter head; fine-tune them first")
        missing = [symbol for symbol in letters.ALPHABET if symbol not in self.checkpoint.alphabet]
        if missing:
            raise InteropError(
                f"alphabet: found {' '.join(self.checkpoint.alphabet)}, expected all of {' '.join(letters.ALPHABET)}; "
                f"missing {' '.join(missing)}"
            )
        rows = torch.tensor([self.checkpoint.alphabet.index(symbol) for symbol in letters.ALPHABET])
        model = HubertCtc(self.size, len(rows))
        model.encoder = self.encoder
        _loaded(model.head, {name: value[rows] for name, value in self.checkpoint.letters.items()})
        return model.eval().to(self.device)

    def save(self, kind: str, folder: str | Path) -> list[Path]:
        """Writes the model for another tool: "hugging_face", "fairseq", "s3prl", "torchaudio", or our own "hubert_ray"."""
        if kind not in files.WRITERS:
            raise InteropError(f"format: found {kind!r}, expected one of {', '.join(files.WRITERS)}")
        return files.write(self.checkpoint, kind, Path(folder))

    def store(self, storage: Storage, name: str) -> str:
        """Seals the model on `storage` as run and iteration `name` ("public/base"), so that recipes can name it as a teacher:
        `teacher = {kind = "layer", of = "public/base", layer = 9}`. Returns its folder there."""
        path = f"runs/{name}/pretrain"
        if storage.exists(f"{path}/{layout.SEAL}"):
            raise StaleArtifactError(f"{path} exists in {storage.url}; give the model another name, or remove that one")
        with tempfile.TemporaryDirectory() as folder:
            written = self.save("hubert_ray", folder)
            with written[0].open("rb") as weights:
                digest = hashlib.file_digest(weights, "sha256").hexdigest()
            storage.upload(Path(folder), path)
        Artifact(storage, path, Identity("import", {"sha256": digest}, {})).seal({"seconds": 0.0})
        return path

    def _prepared(self, wave: np.ndarray | Tensor) -> Tensor:
        wave_S = np.asarray(wave, dtype=np.float32)
        if wave_S.ndim != 1:
            raise InputError(f"waveform: found shape {wave_S.shape}, expected (samples,), mono at 16 kHz")
        if not np.isfinite(wave_S).all():
            raise InputError("waveform: found NaN or infinite samples")
        wave_S = normalise(wave_S) if self.size.normalize_waveform else wave_S
        return torch.from_numpy(np.ascontiguousarray(wave_S))[None].to(self.device)


def load(path: str | Path, device: str | torch.device = "cpu") -> SpeechModel:
    """A model of ours, fairseq's, s3prl's, Hugging Face's or torchaudio's, from a file or folder.

    `path` may be an s3:// or gs:// URL; it is copied to a temporary folder first. No pickled code is run.
    Raises InteropError where there is no such model, StorageError where the place cannot be reached.
    """
    text = str(path)
    if "://" not in text:
        return SpeechModel(files.read(Path(text).expanduser()), device)
    url, _, query = text.partition("?")
    parent, _, name = url.rstrip("/").rpartition("/")
    storage = Storage(f"{parent}?{query}" if query else parent)
    kind = storage.filesystem.get_file_info(storage.full(name)).type
    if kind == fs.FileType.NotFound:
        raise InteropError(f"{text}: found neither a file nor a folder")
    with tempfile.TemporaryDirectory() as folder:
        # Of a folder only what lies directly in it: training checkpoints lie deeper.
        for inside in [name] if kind == fs.FileType.File else [f"{name}/{file}" for file in storage.list(name)]:
            copy = Path(folder) / inside
            copy.parent.mkdir(exist_ok=True)
            fs.copy_files(
                storage.full(inside),
                str(copy),
                source_filesystem=storage.filesystem,
                destination_filesystem=fs.LocalFileSystem(),
            )
        return SpeechModel(files.read(Path(folder) / name), device)


def _loaded(module: Module, state: State) -> Module:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise InteropError(
            f"weights do not fit the settings that came with them: {str(error).splitlines()[-1]}"
        ) from error
    return module
