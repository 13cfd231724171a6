"""How does a command reach Ray? An existing cluster where one is named, else a Ray of its own on this machine. And what do its
nodes say of themselves?"""

from __future__ import annotations

import logging
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hubert_ray import machine
from hubert_ray.config.cluster import Cluster
from hubert_ray.errors import HubertRayError, RecipeError
from hubert_ray.machine import NodeReport
from hubert_ray.storage.filesystem import Storage

DRIVER_CPUS = 0.1  # of a trial that only waits for its training workers, who ask for their own

# Inherited by every worker process, so they must stand in the environment before Ray starts.
_WORKER_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a worker that asked for no GPU sees none
    "THP_MEM_ALLOC_ENABLE": "1",  # torch asks for huge pages: without them a sixth of a step on CPUs is page faults
}


@contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """Inside this block Ray is up and has the CPUs and GPUs that the settings need; a Ray of our own ends with it.

    Raises RecipeError for settings that exclude each other, and where this machine is too small for them. A cluster's size
    is not checked: it may grow, and until then Ray waits.
    """
    check_settings(cluster)
    if ray.is_initialized():
        yield
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in _WORKER_ENVIRONMENT.items()})
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=cluster.worker_logs)
    else:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's C++ side; what matters arrives as an exception
        ray.init(
            num_cpus=max(os.cpu_count() or 1, 2),
            object_store_memory=cluster.object_store_mib * 2**20,
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=cluster.worker_logs,
            _temp_dir=os.environ.get("RAY_TMPDIR") or os.path.join(tempfile.gettempdir(), "ray"),
        )
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        if not address:
            check_fits(cluster, ray.cluster_resources())  # a Ray of our own never grows: it would wait for ever
        yield
    finally:
        ray.shutdown()


def ask_nodes(storage: Storage) -> list[NodeReport]:
    """What every living node says of itself, in the order of their names. Ray must be up."""
    nodes = sorted((node["NodeManagerHostname"], node["NodeID"]) for node in ray.nodes() if node["Alive"])
    return ray.get(
        [
            _report.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(
                storage, name
            )
            for name, node_id in nodes
        ]
    )


@ray.remote(num_cpus=0)
def _report(storage: Storage, node: str) -> NodeReport:
    import torch

    probe, error = f"probe-{uuid.uuid4().hex}", None
    try:
        storage.write(probe, node.encode())
        if storage.read(probe) != node.encode():
            error = "read back something else than was written"
        storage.delete(probe)
    except (HubertRayError, OSError) as caught:
        error = str(caught)
    gpus = [torch.cuda.get_device_properties(i).total_memory / 2**30 for i in range(torch.cuda.device_count())]
    return NodeReport(node, machine.versions(), error, min(gpus, default=None))


def check_settings(cluster: Cluster) -> None:
    """Raises RecipeError for settings that no cluster can carry out, before anything has run."""
    if cluster.precision == "bf16" and cluster.zero_stage == 0:
        raise RecipeError(
            "precision=bf16 with zero_stage=0: expected zero_stage 1 or 2, which train float32 weights and compute in bf16. "
            "Leave --cluster zero_stage away, or train with precision=fp32"
        )
    if 0 < cluster.train_gpus < 1 and max(cluster.train_workers, cluster.trial_workers) > 1:
        raise RecipeError(
            f"train_gpus={cluster.train_gpus:g} for {cluster.train_workers} training workers and {cluster.trial_workers} per "
            "trial: workers of one training cannot share a GPU (NCCL refuses). Use --cluster train_gpus=1, or one worker"
        )


def check_fits(cluster: Cluster, have: dict[str, float]) -> None:
    """Raises RecipeError where what must run at one time to get on is more than `have` (Ray's name -> amount)."""
    training = cluster.train_workers_min or cluster.train_workers
    trial = min(cluster.train_workers_min or cluster.trial_workers, cluster.trial_workers)
    waiting = 0.0 if cluster.trial_workers == 1 else DRIVER_CPUS * cluster.concurrent_trials
    holders = cluster.kmeans_workers * cluster.kmeans_cpus
    pools = [  # who; CPUs, GPUs; what would make it smaller
        (f"{training} training workers", training * cluster.train_cpus, training * cluster.train_gpus,
         "train_workers, train_cpus or train_gpus"),
        (f"a trial of {trial} training workers", trial * cluster.train_cpus + waiting, trial * cluster.train_gpus,
         "trial_workers, train_cpus, train_gpus or concurrent_trials"),
        (f"a data worker beside {cluster.kmeans_workers} k-means workers", cluster.data_cpus + holders, cluster.data_gpus,
         "data_cpus, data_gpus, kmeans_workers or kmeans_cpus"),
    ]  # fmt: skip
    for who, cpus, gpus, smaller in pools:
        for name, amount in (("CPU", cpus), ("GPU", gpus)):
            if amount > have.get(name, 0):
                raise RecipeError(
                    f"{who}: {amount:g} {name} needed, this machine offers {have.get(name, 0):g}. "
                    f"Lower --cluster {smaller}, or name a cluster with --cluster address=…"
                )
