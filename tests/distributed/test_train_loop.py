"""Training gives the same model for any number of workers, any ZeRO stage, after kills, and when it changes midway.

The task is small but goes through everything real: Ray Train, gloo, DeepSpeed, checkpoints on storage.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import ray.train
import safetensors.torch
import torch
from torch import nn

from hubert_ray.config.cluster import Cluster
from hubert_ray.config.sizes import TINY
from hubert_ray.distributed import checkpoint, telemetry
from hubert_ray.distributed.train_loop import StepLoss, TrainJob, _mix, fit
from hubert_ray.errors import TrainingError
from hubert_ray.model.hubert import Encoder
from hubert_ray.storage import layout
from hubert_ray.storage.filesystem import Storage

pytestmark = pytest.mark.slow
STEPS = 9


class Regression(nn.Module):
    """Sum of squared errors of a small network with dropout: random numbers matter."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))

    def forward(self, batch):
        inputs = batch.inputs.to(self.model[0].weight.dtype)
        total = (self.model(inputs) - inputs.sum(1, keepdim=True)).float().square().sum()
        return StepLoss.of(total, [total, len(batch.inputs)])


class Batch:
    def __init__(self, inputs):
        self.inputs = inputs

    def to(self, device):
        return Batch(self.inputs.to(device))


class Dropping(nn.Module):
    """A pre-norm encoder of three blocks, each dropped half of the time, over 12 made-up frames."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder(
            msgspec.structs.replace(TINY, conv_channels=8, layers=3, dim=16, ffn_dim=16, layer_drop=0.5)
        )
        for parameter in [*self.encoder.conv.parameters(), *self.encoder.projection.parameters()]:
            parameter.requires_grad_(False)

    def forward(self, batch):
        hidden_BTD = batch.inputs.repeat(1, 32).view(len(batch.inputs), 12, 16)
        total = self.encoder.finish(self.encoder.blocks(hidden_BTD)[-1])[..., 0].square().sum()
        return StepLoss.of(total, [total, len(batch.inputs)])


class RegressionTask:
    """Three micro-batches of unequal size per step; can die or go wrong at a step, once."""

    micro_batches = 3
    title = "regression"

    def __init__(self, die_at: int = -1, marker: str = "", nan_at: int = -1):
        self._die_at, self._marker, self._nan_at = die_at, Path(marker), nan_at
        self.module = Regression()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.0, weight_decay=0.01)

    def _rows(self, index):
        return 4 + index

    def load(self, step, index):
        rng = np.random.default_rng([step, index])
        inputs = torch.from_numpy(rng.normal(size=(self._rows(index), 6)).astype(np.float32))
        return Batch(inputs * float("nan") if step == self._nan_at else inputs)

    def count(self, step):
        return sum(self._rows(index) for index in range(3))

    def learning_rate(self, step):
        return 0.01 * (step + 1)

    def before_step(self, step):
        if step == self._die_at and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            try:
                os.close(os.open(self._marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            os._exit(9)

    def metrics(self, sums, seconds):
        return {"loss": sums[0] / sums[1]}

    def evaluate(self):
        return {}

    def weights(self, values):
        return {name.removeprefix("model."): value for name, value in values.items()}


class DroppingTask(RegressionTask):
    def __init__(self):
        super().__init__()
        self.module = Dropping()
        self.optimizer = torch.optim.AdamW([p for p in self.module.parameters() if p.requires_grad], lr=0.0)


def test_every_micro_batch_has_a_seed_of_its_own():
    """torch's CPU generator looks at the lower 32 bits: of 100,000 random ones, one pair is expected to be equal."""
    seeds = [_mix(1337, step, index) for step in range(1000) for index in range(100)]
    assert len(set(seeds)) == len(seeds)
    assert len({seed % 2**32 for seed in seeds}) >= len(seeds) - 8
    assert len({seed >> 32 for seed in seeds}) >= len(seeds) - 8
    assert max(seeds) < 2**64
    assert seeds[102] == _mix(1337, 1, 2) == 885788515870962145  # another number would change the rest of a resumed run


def train(folder, workers=2, steps=STEPS, factory=RegressionTask, **cluster):
    storage = Storage(str(folder))
    job = TrainJob(factory, storage, "run", steps, seed=1, clip_norm=1.0, checkpoint_steps=3, log_steps=1)
    fit(job, Cluster(train_workers=workers, **cluster), workers)
    rows = telemetry.read(storage, "run")
    return safetensors.torch.load(storage.read(f"run/{layout.MODEL}")), rows


def assert_same(found, expected, tolerance=1e-6):
    weights, rows = found
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for name, value in expected[0].items():
        torch.testing.assert_close(weights[name], value, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose([r["loss"] for r in rows], [r["loss"] for r in expected[1]], rtol=1e-5)


@pytest.fixture(scope="module")
def expected(ray_local, tmp_path_factory):
    """Two workers, ZeRO 1, undisturbed."""
    return train(tmp_path_factory.mktemp("undisturbed"))


def test_it_trains(expected):
    losses = [row["loss"] for row in expected[1]]
    assert losses[-1] < 0.8 * losses[0]


def test_the_loop_equals_plain_torch(expected):
    """No Ray, no DeepSpeed: the mean over the global batch, clipped, one AdamW step."""
    torch.manual_seed(1)
    task = RegressionTask()
    task.module.train()
    for step in range(STEPS):
        for group in task.optimizer.param_groups:
            group["lr"] = task.learning_rate(step)
        for index in range(3):
            torch.manual_seed(_mix(1, step, index))
            (task.module(task.load(step, index)).total / task.count(step)).backward()
        nn.utils.clip_grad_norm_(task.module.parameters(), 1.0)
        task.optimizer.step()
        task.optimizer.zero_grad()
    for name, value in task.module.model.state_dict().items():
        torch.testing.assert_close(expected[0][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("workers", [1, 4])
def test_other_worker_counts_give_the_same_model(expected, tmp_path, workers):
    """Three micro-batches on four workers: one has only a zero-weighted repeat."""
    assert_same(train(tmp_path, workers=workers, train_cpus=0.5), expected, tolerance=1e-4)


@pytest.mark.parametrize("stage", [0, 2])
def test_other_zero_stages_give_the_same_model(expected, tmp_path, stage):
    assert_same(train(tmp_path, zero_stage=stage), expected, tolerance=1e-4)


def test_bf16_stays_close_and_resumes(expected, tmp_path):
    marker = tmp_path / "died"
    factory = partial(RegressionTask, die_at=7, marker=str(marker))
    _, rows = train(tmp_path, factory=factory, precision="bf16")
    assert marker.exists()
    losses, exact = ([row["loss"] for row in r] for r in (rows, expected[1]))
    np.testing.assert_allclose(losses[:4], exact[:4], rtol=0.02)
    # 8 bits of mantissa, nine steps at learning rates up to 0.09; moments lost with the kill change these by a third
    np.testing.assert_allclose(losses, exact, rtol=0.2)


def test_blocks_dropped_on_one_worker_only(ray_local, tmp_path):
    """LayerDrop draws per micro-batch, so workers drop different blocks: reductions must still match, for any count."""
    alone = train(tmp_path / "one", workers=1, factory=DroppingTask, max_failures=0)
    several = train(tmp_path / "three", workers=3, factory=DroppingTask, train_cpus=0.5, max_failures=0)
    for weights, _ in (several, alone):
        for name in [n for n in weights if n.endswith("qkv.bias")]:
            del weights[name]  # the gradient of a key bias is zero but for rounding, which Adam blows up to full steps
    assert_same(several, alone, tolerance=1e-3)


def test_a_killed_worker_goes_on_from_the_checkpoint(expected, tmp_path):
    marker = tmp_path / "died"
    found = train(tmp_path, factory=partial(RegressionTask, die_at=7, marker=str(marker)))
    assert marker.exists()
    assert_same(found, expected)


def test_resume_at_another_worker_count_and_zero_stage(expected, tmp_path):
    with pytest.raises(ray.train.TrainingFailedError):
        marker = tmp_path / "died"
        train(tmp_path, factory=partial(RegressionTask, die_at=5, marker=str(marker)), max_failures=0)
    assert checkpoint.steps(Storage(str(tmp_path)), "run") == [3]
    assert_same(train(tmp_path, workers=1, zero_stage=2), expected, tolerance=1e-4)


def test_an_unsealed_checkpoint_is_not_used(expected, tmp_path):
    with pytest.raises(ray.train.TrainingFailedError):
        marker = tmp_path / "died"
        train(tmp_path, factory=partial(RegressionTask, die_at=7, marker=str(marker)), max_failures=0)
    storage = Storage(str(tmp_path))
    assert checkpoint.steps(storage, "run") == [3, 6]
    storage.delete(f"run/{layout.checkpoint(6)}/{layout.SEAL}")
    storage.write(f"run/{layout.checkpoint(6)}/part-00000.safetensors", b"rubbish")
    assert_same(train(tmp_path), expected)


def test_a_loss_that_is_not_finite_stops_with_its_step(ray_local, tmp_path):
    with pytest.raises(TrainingError, match="not finite in the 1 steps up to step 5"):
        train(tmp_path, factory=partial(RegressionTask, nan_at=4), max_failures=0)


def test_metrics_of_undone_steps_are_dropped(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write(f"run/{layout.METRICS}", b"".join(msgspec.json.encode({"step": s}) + b"\n" for s in range(1, 9)))
    log = telemetry.Telemetry(storage, "run", resume_step=6)
    log.log({"step": 7, "loss": 1.0})
    log.close()
    assert [row["step"] for row in telemetry.read(storage, "run")] == [1, 2, 3, 4, 5, 6, 7]
    assert storage.list("run/tensorboard")
