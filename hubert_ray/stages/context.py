"""What does a stage get to work with? Its output folder, its sealed inputs, the machine; and models read back from them."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import safetensors.torch
import torch

from hubert_ray.config.cluster import Cluster
from hubert_ray.config.recipe import Mfcc, Recipe, Teacher
from hubert_ray.data.index import Index
from hubert_ray.formats.native import ModelCard
from hubert_ray.model.ctc import HubertCtc
from hubert_ray.model.hubert import Encoder
from hubert_ray.storage import layout
from hubert_ray.storage.artifacts import Artifact
from hubert_ray.storage.filesystem import Storage
from hubert_ray.units.features import FeatureExtractor, LayerExtractor, MfccExtractor


@dataclass(frozen=True)
class Work:
    """One stage's job. `inputs` holds sealed artifacts by role, such as "corpus", "labels", "teacher"."""

    name: str  # full name, such as iter1/pretrain
    recipe: Recipe
    cluster: Cluster
    output: Artifact
    inputs: dict[str, Artifact]

    @property
    def storage(self) -> Storage:
        return self.output.storage

    def index(self) -> Index:
        return Index.open(self.storage, self.inputs["corpus"].path)


@dataclass(frozen=True)
class ModelAt:
    """A model on storage, named so that any worker can load it."""

    storage: Storage
    path: str

    def card(self) -> ModelCard:
        return msgspec.json.decode(self.storage.read(f"{self.path}/{layout.MODEL_CONFIG}"), type=ModelCard)

    def encoder(self) -> Encoder:
        """The body of whichever kind of model, in eval mode."""
        encoder = Encoder(self.card().size)
        body = {name.removeprefix("encoder."): w for name, w in self._weights().items() if name.startswith("encoder.")}
        encoder.load_state_dict(body)
        return encoder.eval().to(device())

    def untrained(self, seed: int) -> Encoder:
        """A body of the same shape with random weights, in eval mode."""
        torch.manual_seed(seed)
        return Encoder(self.card().size).eval().to(device())

    def ctc(self) -> HubertCtc:
        """The recogniser, in eval mode."""
        model = HubertCtc(self.card().size)
        model.load_state_dict(self._weights())
        return model.eval().to(device())

    def _weights(self) -> dict[str, torch.Tensor]:
        return safetensors.torch.load(self.storage.read(f"{self.path}/{layout.MODEL}"))


def device() -> torch.device:
    """The GPU that Ray gave this worker, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_at(artifact: Artifact) -> ModelAt:
    return ModelAt(artifact.storage, artifact.path)


@dataclass(frozen=True)
class TeacherAt:
    """A teacher that any worker can open."""

    teacher: Teacher
    model: ModelAt | None  # None for MFCC
    untrained: bool = False  # another model of the same shape, with random weights: what the architecture alone gives

    def open(self) -> FeatureExtractor:
        if isinstance(self.teacher, Mfcc):
            return MfccExtractor(self.teacher)
        assert self.model is not None
        encoder = self.model.untrained(seed=0) if self.untrained else self.model.encoder()
        return LayerExtractor(encoder, self.teacher.layer)


def teacher_at(work: Work, teacher: Teacher) -> TeacherAt:
    return TeacherAt(teacher, model_at(work.inputs["teacher"]) if "teacher" in work.inputs else None)
