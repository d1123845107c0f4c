"""Small problems side by side on the cores of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")


def each(function: Callable[[A], B], items: Sequence[A], device: torch.device) -> list[B]:
    """Apply `function` to every item, in order; on a CPU to as many at a time as torch has threads, each with one.

    Threads inside a small operation cost more than they give, and wait for one another on a busy machine; threads
    that each have a problem of their own do not. torch's number of threads is as before afterwards.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(items) == 1:
        return [function(item) for item in items]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)
