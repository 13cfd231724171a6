"""What does a lost node, a preemption, an out-of-memory kill or a NaN do to each stage? Pure policy, no Ray.

Everything that can be lost is a pure function of the recipe and of what storage holds, so the answer is always one of
two: do the lost piece again, or stop with an error that a person must answer. What differs is the piece.
"""

from __future__ import annotations

from enum import Enum


class Fault(Enum):
    """What happened."""

    WORKER_LOST = "worker lost"  # process killed, node gone, spot instance taken back, out of memory
    BAD_INPUT = "bad input"  # an error that the user must mend: the same again would fail again
    NOT_FINITE = "loss not finite"
    BUG = "error in the code"


class Action(Enum):
    """What is done about it."""

    RETRY_SHARD = "the shard is done again elsewhere; finished shards stay"
    REBUILD_BLOCKS = "the lost feature blocks are extracted again; centroids stay"
    RESUME_CHECKPOINT = "workers start again from the newest sealed checkpoint"
    RETRY_TRIAL = "the trial goes on from its newest sealed checkpoint"
    STOP = "the run stops; the same command goes on from what is sealed"


ON_LOST_WORKER = {
    "prepare_data": Action.RETRY_SHARD,
    "learn_kmeans": Action.REBUILD_BLOCKS,
    "assign_labels": Action.RETRY_SHARD,
    "pretrain": Action.RESUME_CHECKPOINT,
    "measure_layers": Action.RETRY_SHARD,
    "finetune": Action.RETRY_TRIAL,
    "decode": Action.RETRY_SHARD,
    "report": Action.STOP,  # runs in the driver, in seconds
}


def decide(stage: str, fault: Fault, failures: int, max_failures: int) -> Action:
    """What to do about a fault in `stage` after `failures` earlier ones of its kind."""
    if fault is Fault.WORKER_LOST and failures < max_failures:
        return ON_LOST_WORKER[stage]
    return Action.STOP
