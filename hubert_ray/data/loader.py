"""How is audio read ahead of whoever computes with it? In threads, in order, as far as asked for and no further.

Two levels. `ahead` loads whole items (micro-batches, groups of utterances) before they are asked for: as many at once as it
may hold, yielded in the order they were asked for in. Within an item, `UtteranceReader` (data/collate.py) reads its utterances
side by side, at most FETCHES at a time, so that storage's latency is paid once for many; of these only as many decode at a time
as the worker has CPUs (`AudioReader`). What waits in memory is thus bounded by the items' own sizes, which the plan fixes.
Every item is a pure function of what it is asked for, so neither threads nor their order show in a result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

FETCHES = 16  # ranges under way per worker; 30 ms away, 16 give 500 utterances a second

T = TypeVar("T")
R = TypeVar("R")


def ahead(load: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    """`load(item)` for every item, in order; up to `depth` of them are loaded, or being loaded, before their turn.

    What a load raises is raised where its result would be. Whoever stops early waits only for the loads under way.
    """
    with ThreadPoolExecutor(max_workers=depth, thread_name_prefix="ahead") as pool:
        queue: deque[Future[R]] = deque()
        try:
            for item in items:
                queue.append(pool.submit(load, item))
                if len(queue) > depth:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()
