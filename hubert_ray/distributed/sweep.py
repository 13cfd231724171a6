"""How are many training runs searched? Ray Tune with ASHA over trials.

A trial of one worker trains in its own process; a trial of several drives a Ray Train run of its own and passes on what its
workers report. Trials are listed by the caller, so what is tried depends on the recipe alone; ASHA stops the worse half
at each rung. Which trials it stops can depend on the order in which results arrive, hence on the number of trials side by
side; the winner is always taken among those that reached the end.

A killed search goes on from Tune's own record of it, and each unfinished trial from its newest sealed checkpoint.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from hubert_ray.config.cluster import Cluster
from hubert_ray.distributed.cluster import DRIVER_CPUS
from hubert_ray.distributed.shard_map import user_error
from hubert_ray.distributed.telemetry import Progress
from hubert_ray.distributed.train_loop import TrainJob, fit, reports, train_alone
from hubert_ray.storage.filesystem import Storage


@dataclass(frozen=True)
class Trial:
    """One training run of a search."""

    name: str
    job: TrainJob


@dataclass(frozen=True)
class TrialResult:
    """What a trial reported, in order; the last entry is where it ended or was stopped."""

    name: str
    reports: list[dict[str, float]]


def run_trials(
    trials: list[Trial], metric: str, rungs: tuple[int, ...], folder: str, storage: Storage, cluster: Cluster
) -> list[TrialResult]:
    """Runs all trials, fewest `metric` wins, stopping the worse half at each rung. Results in the order of `trials`."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the older console reporter is silent when told to be
    trainable = tune.with_resources(tune.with_parameters(_drive, trials=trials, cluster=cluster), _resources(cluster))
    path = storage.full(folder)
    if Tuner.can_restore(path, storage_filesystem=storage.filesystem):
        tuner = Tuner.restore(
            path, trainable, storage_filesystem=storage.filesystem, resume_unfinished=True, restart_errored=True
        )
    else:
        parent, name = path.rsplit("/", 1)
        tuner = Tuner(
            trainable,
            param_space={"trial": tune.grid_search(list(range(len(trials))))},
            tune_config=TuneConfig(
                metric=metric,
                mode="min",
                max_concurrent_trials=cluster.concurrent_trials,
                scheduler=ASHAScheduler(
                    time_attr="step", max_t=rungs[-1], grace_period=rungs[0], reduction_factor=2, brackets=1
                ),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=parent,
                storage_filesystem=storage.filesystem,
                failure_config=FailureConfig(max_failures=cluster.max_failures),
                verbose=0,
            ),
        )
    folders = {trial.job.folder.split("/", 2)[-1]: trial.job.folder for trial in trials}
    with Progress(storage, folders, rungs[-1]):
        results = tuner.fit()
    for error in results.errors:
        raise user_error(error) or error
    return [TrialResult(trial.name, reports(trial.job.storage, trial.job.folder)) for trial in trials]


def _resources(cluster: Cluster) -> dict[str, float]:
    if cluster.trial_workers > 1:
        return {"cpu": DRIVER_CPUS}
    return {"cpu": cluster.train_cpus, "gpu": cluster.train_gpus}


def _drive(config: dict[str, Any], trials: list[Trial], cluster: Cluster) -> None:
    """One Tune trial."""
    job = trials[config["trial"]].job
    if cluster.trial_workers > 1:
        fit(job, cluster, cluster.trial_workers, callbacks=[TuneReportCallback()])
    else:
        train_alone(job, cluster, tune.report)
