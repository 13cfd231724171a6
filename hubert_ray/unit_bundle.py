"""How does one folder turn any audio into units, for ever and without Ray? A bundle, and `hubert_ray.load_units`.

    bundle = hubert_ray.load_units("my_bundle")                     # or s3://…; device="cuda"
    units_F = bundle.units(wave)                                     # at bundle.label_rate_hz
    stream = bundle.stream()                                         # the same units while the audio comes in
    for piece in microphone:
        print(stream.push(piece))
    print(stream.close())

A bundle holds `bundle.json`, `centroids.npy`, and for a layer of a model that model in our native format, so that
`hubert_ray.load` opens the folder too. `bundle.json` names the layer, how layers are counted, the label rate and the windows
(units/windows.py), the run it came from and the sha256 of every other file; and it has one of its own. Nothing is used before
all of them are right: a layer that was edited, centroids of another run or weights that were cut short are refused by name.

The units of an utterance are those that the stage assign_labels wrote for it, computed by the same code from the same
numbers. Another processor, or another number of threads, rounds otherwise, which can move a frame that lies halfway between two
centroids.
Notation: S samples at 16 kHz, F frames at the label rate, R centroids of all label streams, D width.
"""

from __future__ import annotations

import hashlib
import io
import math
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from torch import Tensor

from hubert_ray.config.recipe import Layer, Mfcc, Teacher
from hubert_ray.data.frames import SAMPLE_RATE
from hubert_ray.data.index import Index
from hubert_ray.errors import HubertRayError
from hubert_ray.formats import files
from hubert_ray.speech_model import SpeechModel, fetched, prepared_wave
from hubert_ray.storage import layout
from hubert_ray.storage.artifacts import Artifact
from hubert_ray.storage.filesystem import Storage
from hubert_ray.units.features import FeatureExtractor, LayerExtractor, MfccExtractor
from hubert_ray.units.kmeans import Codebook
from hubert_ray.units.windows import UnitStream, Windows

CARD = "bundle.json"
CONVENTIONS: dict[type, str] = {
    Mfcc: "Kaldi MFCC with deltas, as the teacher says; 25 ms windows every 10 ms",
    Layer: "output of a block after its residual (and its norm in post-norm models), counted from 1; 0: input of block 1",
}
FILES: dict[type, tuple[str, ...]] = {
    Mfcc: (layout.CENTROIDS,),
    Layer: (layout.CENTROIDS, layout.MODEL_CONFIG, layout.MODEL),
}
WINDOW_SECONDS = 30.0
CONTEXT_SECONDS = 5.0


class BundleError(HubertRayError):
    """A unit bundle that cannot be made or that is damaged, or whose pieces do not belong together."""


class Origin(msgspec.Struct, frozen=True):
    """A sealed artifact that a bundle was made from."""

    path: str  # on its storage
    fingerprint: str


class BundleCard(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `bundle.json`."""

    format: Literal[1] = 1
    teacher: Teacher
    convention: str  # what the teacher's settings mean
    label_rate_hz: int
    classes: tuple[int, ...]  # clusters of each label stream
    dim: int  # of the teacher's features
    windows: Windows
    made_from: dict[str, Origin]  # by role: "codebook", "corpus", and "teacher" for a layer
    versions: dict[str, str]  # of the libraries that the codebook was made with
    sha256: dict[str, str]  # of each other file
    digest: str = ""  # sha256 of all of the above: what these units are

    @staticmethod
    def digest_of(plain: dict[str, Any]) -> str:
        """What `digest` must be. Of the card as it stands in its file: settings that a later version adds do not change it."""
        rest = {name: value for name, value in plain.items() if name != "digest"}
        return hashlib.sha256(msgspec.json.encode(rest, order="deterministic")).hexdigest()


class UnitBundle:
    """A teacher with its codebook: audio in, units out. `card` tells what it is."""

    def __init__(self, card: BundleCard, centroids_RD: np.ndarray, extractor: FeatureExtractor):
        self.card = card
        self._codebook = Codebook(centroids_RD, card.classes)
        self._extractor = extractor

    @property
    def streams(self) -> int:
        """Units of each frame: one, or several of a cluster ensemble or a product codebook."""
        return len(self.card.classes)

    @property
    def label_rate_hz(self) -> int:
        return self.card.label_rate_hz

    def units(self, wave: np.ndarray | Tensor, *, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
        """units_F of one waveform, (S,) mono in [-1, 1], uint16; resampled to 16 kHz where it has another `sample_rate`. Of a
        codebook with several streams (F, streams).

        One for each of its frames: (S - 400) // stride + 1, none below 400 samples. Beyond `card.windows` they are those of
        windows of it, within which Base's group norm and Large's normalisation of the waveform are computed, as attention is.
        Raises InputError for another shape, integers, samples that are not finite or far beyond 1.
        """
        stream = self.stream()
        return np.concatenate([stream.push(prepared_wave(wave, sample_rate)), stream.close()])

    def stream(self) -> BundleStream:
        """For audio at 16 kHz that comes in pieces of any size; all its units joined are exactly `units` of the whole."""
        return BundleStream(self._units_of_window, SAMPLE_RATE // self.label_rate_hz, self.card.windows, self.streams)

    def _units_of_window(self, wave_S: np.ndarray) -> np.ndarray:
        labels_FS = self._codebook.labels(self._extractor([wave_S])[0])
        return labels_FS if self.streams > 1 else labels_FS[:, 0]


class BundleStream(UnitStream):
    """A stream that takes what `UnitBundle.units` takes: numpy or torch, checked."""

    def push(self, wave: np.ndarray | Tensor) -> np.ndarray:
        return super().push(prepared_wave(wave))


def _centroids(data: bytes) -> np.ndarray:
    """centroids_RD of a codebook's file, those of one stream under those of another (units/kmeans.py)."""
    centroids_RD = np.load(io.BytesIO(data), allow_pickle=False)
    if centroids_RD.dtype != np.float32 or centroids_RD.ndim != 2 or not np.isfinite(centroids_RD).all():
        raise BundleError(
            f"{layout.CENTROIDS}: found {centroids_RD.dtype} {centroids_RD.shape}, expected finite float32 (clusters, width)"
        )
    return centroids_RD


def make_bundle(
    codebook: Artifact,
    teacher: Teacher,
    classes: tuple[int, ...],
    inputs: dict[str, Artifact],
    folder: str,
    window_seconds: float | None = None,
    context_seconds: float = CONTEXT_SECONDS,
) -> BundleCard:
    """Writes a bundle into `folder`, a path or URL that holds nothing yet, from a sealed codebook and the artifacts that it was
    learnt from: "corpus", and "teacher" for a layer.

    `window_seconds`: where None 30, or the longest utterance of the corpus if that is longer, so that each of its
    utterances is one pass and has the units that assign_labels wrote. Raises BundleError where `folder` holds anything or
    windows have no middle, UnsealedArtifactError where an artifact is not finished.
    """
    origins = {"codebook": codebook} | inputs
    seals = {role: artifact.require() for role, artifact in origins.items()}
    target = Storage(folder)
    if found := target.list("", recursive=True):
        raise BundleError(f"{folder}: found {len(found)} files, such as {found[0]}, expected none; give another folder")
    kind = type(teacher)
    if window_seconds is None:
        samples_N = Index.open(inputs["corpus"].storage, inputs["corpus"].path).numbers("samples")
        window_seconds = max(WINDOW_SECONDS, int(samples_N.max()) / SAMPLE_RATE)
    windows = _windows(window_seconds, context_seconds, teacher.frame_rate_hz)
    if (rows := len(_centroids(codebook.read(layout.CENTROIDS)))) != sum(classes):
        raise BundleError(
            f"{codebook.file(layout.CENTROIDS)}: found {rows} centroids, expected {' + '.join(map(str, classes))}"
        )
    pieces = {name: codebook if name == layout.CENTROIDS else inputs["teacher"] for name in FILES[kind]}
    card = BundleCard(
        teacher=teacher,
        convention=CONVENTIONS[kind],
        label_rate_hz=teacher.frame_rate_hz,
        classes=classes,
        dim=_dim(teacher, inputs),
        windows=windows,
        made_from={role: Origin(artifact.path, seals[role].fingerprint) for role, artifact in origins.items()},
        versions=seals["codebook"].facts["versions"],
        sha256={name: _copy(artifact, name, target) for name, artifact in pieces.items()},
    )
    card = msgspec.structs.replace(card, digest=BundleCard.digest_of(msgspec.to_builtins(card)))
    target.write(CARD, msgspec.json.format(msgspec.json.encode(card), indent=1))  # last: without it there is no bundle
    return card


def _dim(teacher: Teacher, inputs: dict[str, Artifact]) -> int:
    return teacher.dim if isinstance(teacher, Mfcc) else inputs["teacher"].read_json(layout.MODEL_CONFIG)["size"]["dim"]


def _windows(window_seconds: float, context_seconds: float, label_rate_hz: int) -> Windows:
    try:
        return Windows(
            frames=math.ceil(window_seconds * label_rate_hz), context=math.ceil(context_seconds * label_rate_hz)
        )
    except ValueError as error:
        raise BundleError(f"window of {window_seconds:g} s, context of {context_seconds:g} s: {error}") from error


def _copy(artifact: Artifact, name: str, target: Storage) -> str:
    """Copies one file of a sealed artifact into a bundle, a little at a time. Returns its sha256; raises BundleError where that is
    not what was sealed."""
    digest, sealed = hashlib.sha256(), artifact.require().files[name]
    with artifact.storage.open(artifact.file(name)) as source, target.create(name) as copy:
        while some := source.read(2**24):
            digest.update(some)
            copy.write(some)
        if digest.hexdigest() != sealed:
            raise BundleError(
                f"{artifact.file(name)}: found sha256 {digest.hexdigest()[:16]}…, sealed was {sealed[:16]}…; make it again after "
                f"{artifact.remove_command()}"
            )
    return sealed


def load_units(path: str | Path, device: str | torch.device = "cpu") -> UnitBundle:
    """The bundle in a folder, or at an s3:// or gs:// URL, which is copied to a temporary folder first.

    Raises BundleError that names the piece which is missing, altered, or does not belong to the others.
    """
    with fetched(path) as folder:
        folder = folder.expanduser()
        card = _card(folder / CARD)
        for name, expected in card.sha256.items():
            _check_digest(folder / name, expected)
        centroids_RD = _centroids((folder / layout.CENTROIDS).read_bytes())
        extractor = _extractor(card.teacher, folder, device)
        widths = (card.dim, card.dim / len(card.classes))  # of a product codebook each stream sees its part
        if len(centroids_RD) != sum(card.classes) or centroids_RD.shape[1] not in widths or card.dim != extractor.dim:
            raise BundleError(
                f"{layout.CENTROIDS}: found {centroids_RD.shape}, {CARD} says {(sum(card.classes), card.dim)}, and the teacher's "
                f"features are {extractor.dim} wide: this is another teacher's codebook"
            )
        return UnitBundle(card, centroids_RD, extractor)


def _extractor(teacher: Teacher, folder: Path, device: str | torch.device) -> FeatureExtractor:
    if isinstance(teacher, Mfcc):
        return MfccExtractor(teacher)
    model = SpeechModel(files.read(folder), device)
    if teacher.layer > model.size.layers:
        raise BundleError(f"{layout.MODEL}: found {model.size.layers} layers, {CARD} names layer {teacher.layer}")
    return LayerExtractor(model.encoder, teacher.layer)


def _card(file: Path) -> BundleCard:
    """The card, right by itself."""
    if not file.exists():
        raise BundleError(
            f"{file}: not there, so this is no unit bundle, or one whose making was interrupted. Make one with "
            "`hubert-ray bundle --recipe … --of … FOLDER`"
        )
    try:
        plain = msgspec.json.decode(file.read_bytes())
        card = msgspec.convert(plain, BundleCard)
    except (OSError, msgspec.DecodeError) as error:
        raise BundleError(f"{file}: cannot be read ({error})") from error
    if card.digest != (found_digest := BundleCard.digest_of(plain)):
        raise BundleError(
            f"{file}: was altered: its digest is {card.digest[:16]}, its content's {found_digest[:16]}. Layer, rate, windows "
            "and digests belong together; copy the bundle again, or make another one"
        )
    kind = type(card.teacher)
    found = (card.convention, card.label_rate_hz, sorted(card.sha256))
    expected = (CONVENTIONS[kind], card.teacher.frame_rate_hz, sorted(FILES[kind]))
    if found != expected:
        raise BundleError(f"{file}: found convention, label rate and files {found}, expected {expected}")
    return card


def _check_digest(file: Path, expected: str) -> None:
    try:
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror}); copy the bundle again") from error
    if found != expected:
        raise BundleError(
            f"{file}: found sha256 {found[:16]}, {CARD} says {expected[:16]}: the file was altered, or is another bundle's. Copy "
            "the bundle again"
        )
