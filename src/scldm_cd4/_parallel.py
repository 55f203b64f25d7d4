"""Work units side by side on one machine, in order and with flat memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any, TypeVar

import torch

In = TypeVar("In")
Out = TypeVar("Out")


@contextmanager
def one_thread_each(device: torch.device, workers: int | None) -> Iterator[int]:
    """Give the number of units to compute at once; on a CPU, torch uses one thread for each inside the block.

    Yields
    ------
    2 on an accelerator, where one unit is drawn and handed on while the other is computed; else `workers` or the
    threads that torch had.
    """
    if device.type != "cpu":
        yield 2
        return
    before = _enter()
    try:
        yield max(1, workers if workers is not None else min(before, os.cpu_count() or 1))
    finally:
        _leave()


_lock = Lock()
_inside, _before = 0, 1  # blocks entered and not left, in any thread; torch's threads outside of them


def _enter() -> int:
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = torch.get_num_threads()
        _inside += 1
        torch.set_num_threads(1)
        return _before


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        torch.set_num_threads(_before)  # in each thread that entered: it is a setting of the thread, too


def in_order(function: Callable[[In], Out], items: Iterable[In], workers: int) -> Iterator[Out]:
    """Yield ``function(item)`` in the order of the items, some at a time, without running far ahead."""
    if workers == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Any] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
