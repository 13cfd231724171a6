"""How does a command reach Ray? An existing cluster where one is named, else a Ray of its own on this machine."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from hubert_ray.config.cluster import Cluster
from hubert_ray.errors import RecipeError

# Inherited by every worker process, so they must stand in the environment before Ray starts.
_WORKER_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """Inside this block Ray is up and has the CPUs and GPUs that the settings need; a Ray of our own ends with it.

    Raises RecipeError where the cluster, at the size it has or may scale to, cannot hold the training workers.
    """
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
            _check_fits(cluster)
        yield
    finally:
        ray.shutdown()


def _check_fits(cluster: Cluster) -> None:
    """A local Ray never grows: asking for more than it has would wait for ever."""
    have = ray.cluster_resources()
    need = {
        "CPU": cluster.train_workers * cluster.train_cpus,
        "GPU": cluster.train_workers * cluster.train_gpus,
    }
    for name, amount in need.items():
        if amount > have.get(name, 0):
            raise RecipeError(
                f"{cluster.train_workers} training workers need {amount:g} {name}; this machine offers {have.get(name, 0):g}. "
                f"Lower --cluster train_workers or train_{name.lower()}s, or name a cluster with --cluster address=…"
            )
