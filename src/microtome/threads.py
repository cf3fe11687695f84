"""Work on several files at a time, on the cores that this process may use."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

# What is done before threads have started, and how many more than cores may wait for the disks of a network.
_FEW, _WAITING = 8, 4
_T = TypeVar("_T")
_R = TypeVar("_R")


def usable_cores() -> int:
    """Cores that this process may use: a job of a cluster has often fewer of them than its machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_threads(function: Callable[[_T], _R], items: Sequence[_T], most: int | None = None) -> list[_R]:
    """What a function gives for each item, in their order.

    Args:
        function: called by several threads at a time; by none but this one where one would do.
        items: for each of which it is called once.
        most: threads; None: as many as there are cores.
    """
    workers = min(len(items), usable_cores() if most is None else most)
    if workers <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))


def looked_at_in_threads(function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """The same of what waits for disks more than it computes, such as reading headers: by more threads, or by none for a few items."""
    return in_threads(function, items, usable_cores() + _WAITING if len(items) > _FEW else 1)
