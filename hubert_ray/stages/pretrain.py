"""labels + audio -> a HuBERT model, trained from random weights to predict the labels of masked frames.

Every iteration starts from random weights; what it inherits from the one before is only the labels.
HuBERT (Hsu et al. 2021) II-B, II-D, IV-C.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from hubert_ray.config.recipe import Pretrain
from hubert_ray.config.sizes import ModelSize
from hubert_ray.data.batching import BatchPlan
from hubert_ray.data.collate import UtteranceReader
from hubert_ray.data.index import Index
from hubert_ray.data.labels import LabelStore
from hubert_ray.data.shards import AudioReader
from hubert_ray.distributed import telemetry
from hubert_ray.distributed.train_loop import StepLoss, TrainJob, fit
from hubert_ray.formats.native import ModelCard
from hubert_ray.model.hubert import Hubert
from hubert_ray.model.loss import pretrain_loss
from hubert_ray.model.masking import batch_mask, masked_count
from hubert_ray.model.optim import adamw, polynomial_lr
from hubert_ray.stages.context import Work
from hubert_ray.storage import layout
from hubert_ray.storage.filesystem import Storage


@dataclass(frozen=True)
class Masked:
    """A micro-batch: waveforms (B, S), labels per stream (B, T, K), and which frames are hidden (B, T), which stays on the CPU."""

    wave_BS: torch.Tensor
    labels_BTK: torch.Tensor
    mask_BT: torch.Tensor

    def to(self, device: torch.device) -> Masked:
        return Masked(self.wave_BS.to(device), self.labels_BTK.to(device), self.mask_BT)


class MaskedPrediction(nn.Module):
    """The model with its loss, so that ZeRO sees one forward pass."""

    def __init__(self, model: Hubert, settings: Pretrain, recompute: bool = False):
        super().__init__()
        self.model = model
        self.model.encoder.recompute_layers = recompute
        self._settings = settings

    def forward(self, batch: Masked) -> StepLoss:
        wave_BS = batch.wave_BS.to(self.model.encoder.mask_vector.dtype)
        parts = pretrain_loss(
            self.model, self.model(wave_BS, batch.mask_BT), batch.labels_BTK, batch.mask_BT, self._settings
        )
        seconds = batch.wave_BS.numel() / 16_000
        sums: list[torch.Tensor | float] = [
            parts.masked_nats, parts.masked_correct, parts.masked_total, parts.unmasked_correct, parts.unmasked_total,
            parts.feature_penalty, 1, seconds,
        ]  # fmt: skip
        return StepLoss.of(parts.total, sums)


class PretrainTask:
    """Masked prediction over the train split, as the training loop wants it (distributed/train_loop.py)."""

    def __init__(
        self, storage: Storage, corpus: str, labels: str, making: str, frame_rate_hz: int, classes: tuple[int, ...],
        size: ModelSize, settings: Pretrain, languages: dict[str, str], title: str, recompute: bool = False,
    ):  # fmt: skip
        self.title = title
        self._settings = settings
        train = Index.open(storage, corpus).split("train")
        self._plan = BatchPlan(train.numbers("samples"), settings, train.by_part(), languages)
        self._labels = LabelStore(storage, corpus, labels, train, frame_rate_hz, len(classes), making)
        self._utterances = UtteranceReader(AudioReader(storage, corpus), train, size.normalize_waveform)
        self.module = MaskedPrediction(Hubert(size, classes), settings, recompute)
        self.optimizer = adamw(self.module.parameters(), settings.betas, settings.eps, settings.weight_decay)
        self.micro_batches = self._plan.micro_batches_per_step

    def load(self, step: int, index: int) -> Masked:
        planned = self._plan.micro_batch(step, index)
        crops = self._utterances.crops(planned, self._labels)
        mask_BT = batch_mask(len(planned.rows), planned.frames, self._settings.mask, self._settings.seed, step, index)
        return Masked(crops.wave_BS, crops.labels_BTK, mask_BT)

    def count(self, step: int) -> int:
        """Masked frames of the whole step (with the unmasked ones, where they carry weight): known without asking anyone."""
        whole = self._settings.unmasked_weight > 0
        return sum(
            crops * (frames if whole else masked_count(frames, self._settings.mask))
            for crops, frames in self._plan.shapes(step)
        )

    def learning_rate(self, step: int) -> float:
        return polynomial_lr(step, self._settings.steps, self._settings.warmup_share, self._settings.peak_lr)

    def before_step(self, step: int) -> None:
        pass

    def metrics(self, sums: np.ndarray, seconds: float) -> dict[str, float]:
        nats, correct, total, other_correct, other_total, penalty, micro_batches, audio = sums.tolist()
        return {
            "loss_bits": nats / total / math.log(2),
            "masked_accuracy": correct / total,
            "unmasked_accuracy": other_correct / max(other_total, 1),
            "feature_penalty": penalty / micro_batches,
            "audio_seconds_per_second": audio / seconds,
        }

    def evaluate(self) -> dict[str, float]:
        return {}

    def weights(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.removeprefix("model."): value for name, value in values.items()}


def pretrain(
    work: Work,
    model: ModelSize,
    classes: tuple[int, ...],
    frame_rate_hz: int,
    settings: Pretrain,
    languages: dict[str, str],
) -> dict[str, Any]:
    """Writes `model.safetensors`, `model.json`, `metrics.jsonl` and TensorBoard files."""
    labels = work.inputs["labels"]
    making = hashlib.sha256(labels.read(layout.SEAL)).hexdigest()  # the fingerprint, and when: labels may be made again
    task = partial(
        PretrainTask, work.storage, work.inputs["corpus"].path, labels.path, making, frame_rate_hz, classes,
        model, settings, languages, work.name, work.cluster.recompute,
    )  # fmt: skip
    job = TrainJob(
        factory=task,
        storage=work.storage,
        folder=work.output.path,
        steps=settings.steps,
        seed=settings.seed,
        clip_norm=settings.clip_norm,
        checkpoint_steps=settings.checkpoint_steps,
        log_steps=settings.log_steps,
    )
    names = tuple(tuple(map(str, range(clusters))) for clusters in classes)
    work.output.write_json(layout.MODEL_CONFIG, ModelCard("hubert", model, names))
    fit(job, work.cluster, work.cluster.train_workers)
    return summary(telemetry.read(work.storage, work.output.path), model, classes, settings)


def summary(
    rows: list[dict[str, float]], size: ModelSize, classes: tuple[int, ...], settings: Pretrain
) -> dict[str, Any]:
    """First and last figures of a training log; the last ones are a mean over the final tenth of the steps."""
    last = [row for row in rows if row["step"] > 0.9 * settings.steps] or rows[-1:]
    mean = {key: float(np.mean([row[key] for row in last])) for key in last[0]}
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Hubert(size, classes).parameters())
    return {
        "steps": settings.steps,
        "parameters": parameters,
        "loss_bits_first": rows[0]["loss_bits"],
        "loss_bits_last": mean["loss_bits"],
        "masked_accuracy": mean["masked_accuracy"],
        "unmasked_accuracy": mean["unmasked_accuracy"],
        "audio_seconds_per_second": float(np.median([row["audio_seconds_per_second"] for row in rows])),
    }
