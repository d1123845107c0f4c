"""Threads that call one model at a time, each entering a module only once the others have come to one as well."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier, BrokenBarrierError
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")

_PATIENCE = 2.0  # seconds that a thread waits for the others, who may call fewer modules or wait for their turn


def in_lockstep(model: nn.Module, work: Callable[[int], T], threads: int = 2) -> list[T | Exception]:
    """Run `work(0)`, `work(1)`, … in threads that take turns in the model, module by module.

    Whatever a model or a module in it notes of one thread's call is then overwritten by the other's before it is read.

    Args:
        model: called by all of them.
        work: what each thread does, given its number.
        threads: how many there are.

    Returns:
        What each returned or raised. One that has ended keeps the others waiting no longer.

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(2.0)
        >>> in_lockstep(model, lambda number: model(torch.tensor([float(number)])).item())
        [0.0, 2.0]
    """
    barrier = Barrier(threads)

    def meet(*_: Any) -> None:
        with suppress(BrokenBarrierError):
            barrier.wait(_PATIENCE)

    def run(number: int) -> T | Exception:
        try:
            return work(number)
        except Exception as error:
            return error
        finally:
            barrier.abort()

    called = [module for module in model.modules() if module is model or not list(module.children())]
    handles = [module.register_forward_pre_hook(meet) for module in called]
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(run, range(threads)))
    finally:
        for handle in handles:
            handle.remove()
