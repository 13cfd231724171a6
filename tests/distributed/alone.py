"""The real training tasks on a minute of noise, trained by a process of its own without Ray, on the CPU or on a GPU."""

from __future__ import annotations

import io
import multiprocessing
import os
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import soundfile

from hubert_ray.config.cluster import Cluster
from hubert_ray.config.recipe import Finetune, Pretrain
from hubert_ray.config.sizes import TINY
from hubert_ray.data.frames import frames_of
from hubert_ray.data.shards import RawUtterance, write_shard
from hubert_ray.distributed.train_loop import TrainJob, train_alone
from hubert_ray.formats.native import ModelCard
from hubert_ray.stages.context import ModelAt
from hubert_ray.stages.finetune import Choice, CtcTask
from hubert_ray.stages.pretrain import PretrainTask
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage
from tests.corpora import write_corpus

STEPS, CHECKPOINT_STEPS = 6, 2
CLASSES = 10
SIZE = msgspec.structs.replace(
    TINY, conv_channels=16, layers=2, dim=32, ffn_dim=64, heads=2, codeword_dim=16, position_kernel=16,
    dropout=0.1, attention_dropout=0.1,
)  # fmt: skip
PRETRAIN = Pretrain(
    steps=STEPS, peak_lr=1e-3, batch_seconds=12, micro_batch_seconds=6, min_crop_seconds=1, max_crop_seconds=2,
    crop_lengths=2, log_steps=1,
)  # fmt: skip
FINETUNE = Finetune(steps=STEPS, batch_seconds=12, micro_batch_seconds=6, channel_mask_prob=0.0, dropout=0.1)


class DyingPretrain(PretrainTask):
    """Ends its process before a step, once; -1: never."""

    def __init__(self, *args, die_at: int = -1, marker: str = ""):
        super().__init__(*args)
        self._die_at, self._marker = die_at, marker

    def before_step(self, step: int) -> None:
        if step == self._die_at:
            die_once(self._marker)


class DyingCtc(CtcTask):
    """Ends its process while it evaluates after a step, once; -1: never."""

    def __init__(self, *args, die_at: int = -1, marker: str = ""):
        super().__init__(*args)
        self._die_at, self._marker, self._done = die_at, marker, 0

    def before_step(self, step: int) -> None:
        super().before_step(step)
        self._done = step + 1

    def evaluate(self) -> dict[str, float]:
        if self._done == self._die_at:
            die_once(self._marker)
        return super().evaluate()


def die_once(marker: str) -> None:
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os._exit(9)


def make_inputs(folder: Path) -> Storage:
    """A storage with a corpus of noise, random labels for it, and the card of a model."""
    storage, rng = Storage(str(folder)), np.random.default_rng(0)
    raws = []
    for number in range(24):
        buffer = io.BytesIO()
        wave = (0.1 * rng.normal(size=int(rng.integers(32_000, 40_000)))).astype(np.float32)
        soundfile.write(buffer, wave, 16_000, format="WAV", subtype="FLOAT")
        split = "dev" if number >= 20 else "train"
        raws.append(RawUtterance(f"u{number:02d}", "s", split, "wav", buffer.getvalue(), text="NO MORE NOISE"))
    shards = {f"{split}-00000": [raw for raw in raws if raw.split == split] for split in ("train", "dev")}
    tables = {shard: write_shard(storage, "corpus", shard, found).manifest for shard, found in shards.items()}
    write_corpus(storage, "corpus", tables)
    for shard, table in tables.items():
        labels = [
            {
                "utterance_id": row["utterance_id"],
                "labels": rng.integers(0, CLASSES, size=frames_of(row["samples"])),
                "frame_rate_hz": 50,
            }
            for row in table.to_pylist()
        ]
        part = pa.Table.from_pylist(labels, schema=schemas.LABELS)
        storage.write(f"labels/{layout.part(shard)}", schemas.encode(part))
    storage.write(f"model/{layout.MODEL_CONFIG}", msgspec.json.encode(ModelCard("hubert", SIZE)))
    return storage


def pretraining(storage: Storage, folder: str, recompute: bool = False, **fault) -> TrainJob:
    factory = partial(
        DyingPretrain,
        storage,
        "corpus",
        "labels",
        storage.url,
        50,
        (CLASSES,),
        SIZE,
        PRETRAIN,
        {},
        "noise",
        recompute,
        **fault,
    )
    return TrainJob(factory, storage, folder, STEPS, 1, PRETRAIN.clip_norm, CHECKPOINT_STEPS, 1)


def finetuning(storage: Storage, folder: str, recompute: bool = False, **fault) -> TrainJob:
    """Reports after 2, 4 and 6 steps, where it also saves."""
    choice = Choice(peak_lr=1e-3, freeze_share=0.0, mask_prob=0.3)
    factory = partial(
        DyingCtc, "corpus", ModelAt(storage, "model"), "scratch", FINETUNE, choice, "noise", recompute, **fault
    )
    return TrainJob(factory, storage, folder, STEPS, 1, FINETUNE.clip_norm, CHECKPOINT_STEPS, 1, (2, 4, 6))


def train(job: TrainJob, cluster: Cluster) -> tuple[int, list[dict[str, float]]]:
    """(exit status of the training process, what it reported)."""
    heard = Path(job.storage.full(f"{job.folder}-heard"))
    heard.parent.mkdir(parents=True, exist_ok=True)
    heard.unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(job, cluster, heard))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, [msgspec.json.decode(line) for line in heard.read_bytes().splitlines()]


def _train(job: TrainJob, cluster: Cluster, heard: Path) -> None:
    with heard.open("ab", buffering=0) as stream:
        train_alone(job, cluster, lambda row: stream.write(msgspec.json.encode(row) + b"\n"))
