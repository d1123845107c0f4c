"""A hook of a callback that calls another of its hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def same_as(hook: str) -> Callable[..., None]:
    """Return a method that calls another hook of the same callback, a subclass's where it overrides that.

    Example:
        >>> import lightning as L
        >>> class Counts(L.Callback):
        ...     calls = 0
        ...     def on_validation_start(self, trainer, pl_module): self.calls += 1
        ...     on_test_start = same_as("on_validation_start")
        >>> class CountsDouble(Counts):
        ...     def on_validation_start(self, trainer, pl_module): self.calls += 2
        >>> callback = CountsDouble()
        >>> callback.on_test_start(None, None)
        >>> callback.calls
        2
    """

    def same(self: Any, *args: Any, **kwargs: Any) -> None:
        getattr(self, hook)(*args, **kwargs)

    return same
