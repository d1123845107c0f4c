"""What is known of a model's calls before they are made, by the thread or task that makes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_peft.per_thread import PerThread
from lightning_peft.positions.generation import Generation


@dataclass(frozen=True, eq=False)
class CallContext:
    """Facts about calls, known before they are made: `answering`'s start and mask, the batch's, those of `generate`.

    `labels [B, T]` are the batch's, -100 outside its answers. `plain` is True where a text with no other sign of an
    answer is plain text.
    """

    start: Tensor | None = None
    mask: Tensor | None = None
    batch: Tensor | None = None
    labels: Tensor | None = None
    generation: Generation | None = None
    plain: bool | None = None


_NOTHING = CallContext()
# asyncio's tasks share a thread
_CONTEXTS: ContextVar[Mapping[Contexts, CallContext]] = ContextVar("_CONTEXTS", default={})  # noqa: B039 - never changed in place


class Contexts:
    """The contexts of one model's calls, those of each thread and task apart."""

    def __init__(self) -> None:
        self._compiled: PerThread[CallContext] = PerThread()  # as `_CONTEXTS`, for compiled code

    @property
    def known(self) -> CallContext:
        """What is known here of the calls to come."""
        # compiled code cannot read a context variable
        return (self._compiled.get() if torch.compiler.is_compiling() else _CONTEXTS.get().get(self)) or _NOTHING

    @contextmanager
    def giving(self, plain: bool = False, **values: Any) -> Iterator[None]:
        """Note these values for the calls that the thread or task makes inside; `CallContext` has their names."""
        outer = self.known
        self._set(replace(outer, plain=plain or outer.plain, **values))
        try:
            yield
        finally:
            self._set(outer)

    def note_batch(self, start: Tensor | None, labels: Tensor | None = None) -> None:
        """Note where the answers of the batch begin, `[B]`, or its labels, `[B, T]`, until the next is noted.

        None forgets it.
        """
        self._set(replace(self.known, batch=start, labels=labels))

    def _set(self, context: CallContext) -> None:
        others = {contexts: known for contexts, known in _CONTEXTS.get().items() if contexts is not self}
        known = any(value is not None for value in vars(context).values())
        _CONTEXTS.set({**others, self: context} if known else others)
        self._compiled.set(context)
