"""How does training run? One loop for pretraining and for CTC, executed by every Ray Train worker.

A `Task` says what a step is (its micro-batches, their loss, the learning rate); this file says who computes which part.
Worker r of W takes micro-batches r, r + W, … of each step. Every micro-batch seeds its own random numbers from (seed, step,
position), and its loss is divided by the step's global count, so the gradient is the same sum for every W, up to the order
of floating-point additions. Where W does not divide the micro-batches, the short workers add zero-weighted repeats.

Workers look for the newest sealed checkpoint on storage when they start. That alone makes a lost worker, a lost node, a
killed driver and a changed number of workers the same case.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
import ray.train
import ray.train.torch
import safetensors.torch
import torch
import torch.distributed
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from hubert_ray.config.cluster import Cluster
from hubert_ray.data.loader import ahead
from hubert_ray.distributed import checkpoint, zero
from hubert_ray.distributed.shard_map import user_error
from hubert_ray.distributed.telemetry import Progress, Telemetry
from hubert_ray.errors import TrainingError
from hubert_ray.model.optim import set_lr
from hubert_ray.storage import layout
from hubert_ray.storage.filesystem import Storage

PREFETCH = 4  # micro-batches loaded ahead of the model


@dataclass(frozen=True)
class StepLoss:
    """One micro-batch's contribution to a step."""

    total: torch.Tensor  # a sum; divided by the step's global count before the backward pass
    sums: torch.Tensor  # (n,) float64, detached: what metrics are made of; adds up over micro-batches and workers

    @classmethod
    def of(cls, total: torch.Tensor, sums: Sequence[torch.Tensor | float]) -> StepLoss:
        """`sums` are plain numbers and scalars on the device of `total`, where NCCL wants to find them all."""

        def scalar(value: torch.Tensor | float) -> torch.Tensor:
            if isinstance(value, torch.Tensor):
                return value.detach().double()
            # filled in on the device: a copy from the host would wait for the forward pass
            return torch.full((), value, dtype=torch.float64, device=total.device)

        return cls(total, torch.stack([scalar(value) for value in sums]))


class Task(Protocol):
    """What is trained. Made by a factory inside each worker."""

    micro_batches: int  # per step
    title: str  # for messages

    @property
    def module(self) -> torch.nn.Module:
        """forward(batch) -> StepLoss"""

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def load(self, step: int, index: int) -> Any:
        """A micro-batch in host memory; called from background threads, several at a time. `.to(device)` moves it."""

    def count(self, step: int) -> int:
        """What the step's summed loss is divided by."""

    def learning_rate(self, step: int) -> float: ...

    def before_step(self, step: int) -> None: ...

    def metrics(self, sums: np.ndarray, seconds: float) -> dict[str, float]:
        """A row of metrics from the sums of all micro-batches since the last row."""

    def evaluate(self) -> dict[str, float]:
        """Scores the model as it is; called at `TrainJob.report_steps`."""

    def weights(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors to export, from the float32 values of the module's trained parameters."""


@dataclass(frozen=True)
class TrainJob:
    """A training run of one artifact folder. `factory` builds the task in each worker and must pickle."""

    factory: Callable[[], Task]
    storage: Storage
    folder: str
    steps: int
    seed: int
    clip_norm: float
    checkpoint_steps: int
    log_steps: int
    report_steps: tuple[int, ...] = ()  # after these many steps: evaluate, and report


def fit(job: TrainJob, cluster: Cluster, workers: int, callbacks: list[Any] | None = None) -> None:
    """Trains to the end on Ray Train workers, over lost ones; leaves `model.safetensors` and `metrics.jsonl`.

    `callbacks` are Ray Train's; a Tune trial passes one that carries reports on.
    """
    if cluster.train_workers_min and workers > 1:
        scale: int | tuple[int, int] = (min(cluster.train_workers_min, workers), workers)  # a trial may have fewer
    else:
        scale = workers
    resources = {"CPU": cluster.train_cpus} | ({"GPU": cluster.train_gpus} if cluster.train_gpus else {})
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job, "cluster": cluster},
        scaling_config=ScalingConfig(
            num_workers=scale,  # type: ignore[arg-type]  # Ray Train's hints are those of its v1, which has no (min, max)
            use_gpu=cluster.train_gpus > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=job.storage.full(job.folder),
            storage_filesystem=job.storage.filesystem,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=callbacks,
        ),
    )
    try:
        with Progress(job.storage, {job.folder.split("/", 2)[-1]: job.folder}, job.steps):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise user_error(error) or _first_worker_error(error) or error from error
    finally:
        job.storage.delete(f"{job.folder}/ray")


def _first_worker_error(error: BaseException) -> BaseException | None:
    failures = getattr(error, "worker_failures", None) or {}
    return next((found for found in map(user_error, failures.values()) if found), None)


def reports(storage: Storage, folder: str) -> list[dict[str, float]]:
    """What a training run reported so far, from storage: what Ray remembers does not outlive a restart."""
    path = f"{folder}/{layout.REPORTS}"
    return msgspec.json.decode(storage.read(path)) if storage.exists(path) else []


def _worker(config: dict[str, Any]) -> None:
    """The training function of one Ray Train worker."""
    report = ray.train.report if config["job"].report_steps else None
    train(config["job"], config["cluster"], ray.train.torch.get_device(), report)


def train_alone(job: TrainJob, cluster: Cluster, report: Callable[[dict[str, float]], None]) -> None:
    """The same training by this process only, for callers that are a worker already, such as a Tune trial."""
    device = torch.device("cuda:0" if cluster.train_gpus else "cpu")
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }  # DeepSpeed reads them even beside a process group
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        train(job, cluster, device, report)
    finally:
        torch.distributed.destroy_process_group()


def train(
    job: TrainJob, cluster: Cluster, device: torch.device, report: Callable[[dict[str, float]], None] | None
) -> None:
    """One worker's part, inside an initialised process group: find the newest checkpoint, go on to the last step."""
    torch.set_num_threads(max(1, int(cluster.train_cpus)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # DeepSpeed takes this for the number of the GPU, which it is not where workers have two GPUs, or share one.
        os.environ["LOCAL_RANK"] = str(device.index)
    torch.manual_seed(job.seed)  # the same initial weights on every rank
    task = job.factory()
    start = _newest_checkpoint(job, device)
    if start:
        checkpoint.load_weights(task.module, start, job.storage, job.folder)
    task.module.to(device)
    world = torch.distributed.get_world_size()
    engine = zero.engine(task.module, task.optimizer, cluster, -(-task.micro_batches // world), job.clip_norm)
    if start:
        checkpoint.load_optimizer(engine, start, job.storage, job.folder)
    _Loop(job, cluster, task, engine, device, report).run(start)


def _newest_checkpoint(job: TrainJob, device: torch.device) -> int:
    """The step to go on from, as rank 0 sees it; 0 where there is no sealed checkpoint."""
    sealed = checkpoint.steps(job.storage, job.folder) if torch.distributed.get_rank() == 0 else []
    start = torch.tensor([sealed[-1] if sealed else 0], device=device)
    torch.distributed.broadcast(start, src=0)
    return int(start)


class _Loop:
    """The steps of one worker."""

    def __init__(
        self,
        job: TrainJob,
        cluster: Cluster,
        task: Task,
        engine: Any,
        device: torch.device,
        report: Callable[[dict[str, float]], None] | None,
    ):
        self._job, self._cluster, self._task, self._engine, self._device = job, cluster, task, engine, device
        self._report_to = report
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._sums: torch.Tensor | None = None

    def run(self, start: int) -> None:
        job, rank = self._job, self._rank
        telemetry = Telemetry(job.storage, job.folder, start) if rank == 0 else None
        batches = self._batches(start)
        since, clock = start, time.perf_counter()
        self._engine.train()
        self._repeat_reports(start)
        for step in range(start, job.steps):
            self._step(step, batches)
            done = step + 1
            saves = done % job.checkpoint_steps == 0 and done < job.steps
            if (
                done % job.log_steps == 0 or saves or done in (1, job.steps)
            ):  # at a checkpoint, so that a resumed log is the same
                row = self._row(done, time.perf_counter() - clock, done - since)
                since, clock = done, time.perf_counter()
                if telemetry:
                    telemetry.log(row)
            if done in job.report_steps:
                self._report(done)  # before saving: who dies in between reports again, and never goes on without
            if saves:
                checkpoint.save(self._engine, done, job.storage, job.folder, self._cluster.keep_checkpoints)
        self._export()
        if telemetry:
            telemetry.close()

    def _batches(self, start: int) -> Iterator[Any]:
        """This worker's micro-batches from step `start` on, read ahead; None stands for a repeat."""
        rounds = -(-self._task.micro_batches // self._world)
        wanted = (
            (step, index if index < self._task.micro_batches else None)
            for step in range(start, self._job.steps)
            for index in range(self._rank, rounds * self._world, self._world)
        )
        return ahead(lambda at: (at[1], self._task.load(at[0], at[1] or 0)), wanted, PREFETCH)

    def _step(self, step: int, batches: Iterator[Any]) -> None:
        task, engine = self._task, self._engine
        rounds = -(-task.micro_batches // self._world)
        scale = rounds * self._world / task.count(step)  # DeepSpeed divides by both
        set_lr(engine.optimizer, task.learning_rate(step))
        task.before_step(step)
        for _ in range(rounds):
            index, batch = next(batches)
            torch.manual_seed(_mix(self._job.seed, step, index or 0))
            loss = engine(batch.to(self._device))
            weight = 0.0 if index is None else scale
            engine.backward(loss.total * weight)
            engine.step()
            counted = loss.sums if index is not None else torch.zeros_like(loss.sums)
            self._sums = counted if self._sums is None else self._sums + counted

    def _row(self, done: int, seconds: float, steps: int) -> dict[str, float]:
        """Metrics over the steps since the last row, summed over all workers. Collective."""
        sums = self._sums
        assert sums is not None, "a row of metrics before any step"
        torch.distributed.all_reduce(sums)
        row = {name: float(value) for name, value in self._task.metrics(sums.cpu().numpy(), seconds).items()}
        self._sums = None
        if not all(np.isfinite(value) for value in row.values()):
            raise TrainingError(
                f"{self._task.title}: metrics are not finite in the {steps} steps up to step {done}: {row}. Lower peak_lr or "
                "raise warmup_share; the run goes on from the last checkpoint before it"
            )
        return {"step": done, **row, "learning_rate": self._task.learning_rate(done - 1), "seconds": seconds}

    def _repeat_reports(self, start: int) -> None:
        """Tells again what was reported before the checkpoint: a restored search may not have heard. ASHA counts it once."""
        if self._report_to:
            for row in reports(self._job.storage, self._job.folder):
                if row["step"] <= start:
                    self._report_to(row)

    def _report(self, done: int) -> None:
        """Evaluates and tells whoever asked. Exported first: a scheduler may end a trial as soon as it hears of a result."""
        self._export()
        self._engine.eval()
        scores = self._task.evaluate()
        self._engine.train()
        if self._rank == 0:
            earlier = [row for row in reports(self._job.storage, self._job.folder) if row["step"] < done]
            data = msgspec.json.encode([*earlier, {"step": done, **scores}])
            self._job.storage.write(f"{self._job.folder}/{layout.REPORTS}", data)
        if self._report_to:
            self._report_to({"step": done, **scores})

    def _export(self) -> None:
        """Writes the weights as one file, float32. Collective."""
        values = {}
        for state in zero.full_state(self._engine):
            if self._rank == 0:
                values[state.name] = state.value.cpu().contiguous()
        if self._rank == 0:
            tensors = safetensors.torch.save(self._task.weights(values))
            self._job.storage.write(f"{self._job.folder}/{layout.MODEL}", tensors)
        torch.distributed.barrier()


def _mix(seed: int, step: int, index: int) -> int:
    """One 64-bit seed from three numbers. Both halves are well mixed: torch's CPU generator looks at the lower one only."""
    return int(np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)[0])
