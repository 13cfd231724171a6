"""How is a function run over all shards of a corpus? On Ray Data, a pool of actors, a shard at a time.

A worker turns one shard into one part file and a small row of facts. Parts that exist are skipped, so a killed stage goes
on where it was; a lost actor's shard is given to another one by Ray Data. What a shard yields depends on the shard alone,
hence the number of workers never shows in the result. Only shard names go in and only facts come out.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import msgspec
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from hubert_ray.config.cluster import Cluster
from hubert_ray.errors import HubertRayError


class ShardWorker(Protocol):
    """Made once per actor; called once per shard. Returns facts about what it did: plain numbers and strings."""

    def __call__(self, shard: str, /) -> dict[str, Any]: ...


class _Adapter:
    """What Ray Data calls: builds the worker inside the actor, where its model and files belong.

    A user's error travels as data: Ray retries and wraps exceptions, and loses what they were caused by.
    """

    def __init__(self, factory: Callable[[], ShardWorker]):
        self._factory = factory
        self._worker: ShardWorker | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        facts, error = {}, b""
        try:
            if self._worker is None:
                self._worker = self._factory()
            facts = self._worker(row["shard"])
        except HubertRayError as caught:
            error = pickle.dumps(caught)
        return {"facts": msgspec.json.encode({"shard": row["shard"], **facts}), "error": error}


def shard_map(factory: Callable[[], ShardWorker], shards: list[str], cluster: Cluster) -> Iterator[dict[str, Any]]:
    """Yields the facts of each shard as shards finish, in no particular order. `factory` must pickle.

    An error of the user's (HubertRayError) that a worker raises is raised here as itself.
    """
    if not shards:
        return
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    workers = max(1, min(cluster.data_workers, len(shards)))
    rows = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Ray has announced another way of naming the two bounds, but `map` lacks it yet
        mapped = _map(rows, factory, workers, cluster)
    for row in mapped.iter_rows():
        if row["error"]:
            raise pickle.loads(row["error"])
        yield msgspec.json.decode(row["facts"])


def _map(
    rows: ray.data.Dataset, factory: Callable[[], ShardWorker], workers: int, cluster: Cluster
) -> ray.data.Dataset:
    return rows.map(
        _Adapter,  # type: ignore[arg-type]  # Ray Data takes a class too; map_batches is typed so, map is not
        fn_constructor_args=(factory,),
        compute=ActorPoolStrategy(min_size=1, initial_size=workers, max_size=workers),
        num_cpus=cluster.data_cpus,
        num_gpus=cluster.data_gpus or None,
        max_restarts=cluster.max_failures,  # of an actor; without a bound a shard that kills its worker would do so for ever
        max_task_retries=cluster.max_failures,
    )


def user_error(error: BaseException | None) -> HubertRayError | None:
    """The user's error at the root of what Ray raises, if that is what it is."""
    while error is not None:
        if isinstance(error, HubertRayError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
