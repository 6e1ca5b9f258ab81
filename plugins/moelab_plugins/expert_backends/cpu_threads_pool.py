"""Tasks side by side on a CPU's cores, each with one thread: many small matmuls run best so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Task = TypeVar("Task")


def side_by_side(compute: Callable[[Task], None], tasks: Sequence[Task]) -> None:
    """compute(task) for each of them, on as many threads as torch has. Tasks must not write to the same place."""
    threads = torch.get_num_threads()
    if threads == 1 or len(tasks) < 2:
        for task in tasks:
            compute(task)
        return
    queue = iter(tasks)

    @torch.no_grad()  # the mode belongs to a thread
    def work() -> None:
        for task in queue:  # next() on a list's iterator is atomic
            compute(task)

    for future in [pool(threads).submit(work) for _ in range(threads)]:
        future.result()


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """`threads` workers whose matmuls use one thread; shared by all layers, started when first used."""
    everyone = threading.Barrier(threads)
    workers = ThreadPoolExecutor(threads, "experts", initializer=_one_thread)
    list(workers.map(lambda _: everyone.wait(), range(threads)))
    torch.set_num_threads(threads)  # the last setting is also the default of threads yet to come
    return workers


def _one_thread() -> None:
    """Only the first look at the number makes a thread take the default, which would undo an earlier setting."""
    torch.get_num_threads()
    torch.set_num_threads(1)
