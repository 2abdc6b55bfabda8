"""Independent pieces of work, two at a time on a CPU.

The operators of small models use two threads badly: sampling and measuring ten pocket clips takes 7.3 s with one thread
and 5.1 s with two; two batches at once, with one thread each, take 3.9 s per batch (docs/log/machines.md).
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

AT_ONCE = 2


def in_order(work: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Iterator[Result]:
    """Yield work(item) of each item, in the order of the items.

    On a CPU with two threads or more, two items are worked on at once, each with half of torch's threads; otherwise one
    after the other. `work` must be safe to call from two threads, and must set no_grad and autocast itself, because
    they hold for one thread only.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < AT_ONCE:
        yield from map(work, items)
        return
    share = threads // AT_ONCE
    pool = ThreadPoolExecutor(AT_ONCE, initializer=torch.set_num_threads, initargs=(share,))
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the number that a worker set also holds for threads that begin later
