"""HOW is a run executed? Workers, CPUs and GPUs, ZeRO stage, retries. Never part of a run's identity.

Two runs of one recipe with different values here make the same artifacts up to rounding: the order in which workers' sums
are added, and `precision`. What was used is recorded in each seal.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from hubert_ray.config.values import Count, Natural, NotNegative, Settings


class Cluster(Settings, frozen=True, kw_only=True):
    """Resources of one invocation. The defaults suit a laptop with two cores."""

    address: str | None = None  # of a running Ray cluster; None: RAY_ADDRESS, or a Ray of our own on this machine
    train_workers: Count = 2  # processes that share out the micro-batches of a step
    train_workers_min: Count | None = None  # elastic: go on with as few as these when nodes are taken away
    train_cpus: NotNegative = 1.0  # per training worker
    train_gpus: NotNegative = 0.0  # per training worker
    data_workers: Count = 2  # actors at most that read shards, extract features, label, decode
    data_cpus: NotNegative = 1.0  # per actor
    data_gpus: NotNegative = 0.0  # per actor
    kmeans_workers: Annotated[int, Meta(ge=1, le=64)] = (
        2  # actors that hold the feature sample, each with some of 64 lanes
    )
    kmeans_cpus: NotNegative = (
        0.0  # per such actor; above 0 on a cluster, so that they land on worker nodes and not on the head
    )
    kmeans_gpus: NotNegative = 0.0  # per such actor; above 0 it assigns frames to clusters on its GPU
    concurrent_trials: Count = 2  # fine-tuning trials side by side
    trial_workers: Count = 1  # training workers of each trial
    zero_stage: Literal[0, 1, 2] = 1  # DeepSpeed ZeRO; 964 M parameters need no stage 3
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 wants zero_stage 1 or 2, which keep fp32 weights beside
    recompute: bool = False  # blocks' activations again in the backward pass: a third more compute, far less memory
    cache_dir: str | None = None  # of each node, on its own disk: keeps audio read from s3:// or gs://; None: no cache
    cache_gib: NotNegative = 100.0  # at most so much of it, for all workers of a node together
    max_failures: Natural = 3  # lost workers that a stage survives
    keep_checkpoints: Count = 2
    object_store_mib: Count = 512  # of a Ray that we start ourselves
    worker_logs: bool = False  # show on the console what worker processes print
