"""Notice a loss, an adapter or an argument that is not finite."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.backbone.sharded import local_part


class FiniteLoss:
    """The first step whose loss was not finite, on the loss's own device, which nothing waits for."""

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def note(self, loss: Tensor, step: int) -> None:
        """Look at the loss of one step; `loss` is a scalar."""
        bad = ~torch.isfinite(loss.detach())
        if self._first is None:
            self._first = torch.full_like(bad, -1, dtype=torch.long)
        self._first = torch.where(bad & (self._first < 0), step, self._first)

    def check(self) -> None:
        """Wait for the device, and raise `ValueError` naming the first step with a loss that was not finite."""
        if self._first is not None and (step := int(self._first)) >= 0:
            raise ValueError(
                f"The training loss is not finite since step {step}: lower the learning rate, or look at the batch and "
                "the base's weights; check_finite=False lets such steps pass."
            )


def check_finite_tensors(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise `ValueError` naming the first of these tensors that holds NaN or infinity.

    Args:
        tensors: by name.
        what: their common name in messages.
    """
    local = ((name, local_part(value.detach())) for name, value in tensors.items())
    floats = {name: value for name, value in local if value.is_floating_point() and value.numel()}
    norms = torch._foreach_norm(list(floats.values()), math.inf) if floats else []
    if norms and not torch.stack([norm.float() for norm in norms]).isfinite().all():
        name = next(name for name, norm in zip(floats, norms, strict=True) if not torch.isfinite(norm))
        raise ValueError(f"{what} is no longer finite, the first tensor is {name}: nothing of it is saved.")


def finite_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor raise `ValueError` for a number that is not finite, before it does anything."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            arguments = signature.bind(self, *args, **kwargs).arguments
        except TypeError:
            arguments = {}  # a wrong call, of which Python itself tells best
        for name, number in _numbers(arguments):
            if not math.isfinite(number):
                raise ValueError(f"{type(self).__name__} needs a finite {name}, got {number}.")
        init(self, *args, **kwargs)

    return checked


def _numbers(values: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in an argument, with the name of the innermost argument or key that holds each."""
    if isinstance(values, float):
        yield name, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _numbers(value, str(key))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _numbers(value, name)
