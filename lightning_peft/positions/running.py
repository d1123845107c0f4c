"""The call of a model that runs: in this thread, or again in a backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_peft.per_thread import PerThread
from lightning_peft.positions.call import Call


class RunningCall:
    """Which call the layers of a model are to see, in each thread and each backward pass."""

    def __init__(self) -> None:
        self._running: PerThread[Call] = PerThread()
        self.recalled: dict[int, Call] = {}  # by the backward pass that runs some of its blocks again

    @property
    def seen(self) -> Call | None:
        """The call that runs, or the one whose blocks a backward pass runs again, in whatever thread."""
        if self.recalled and not torch.compiler.is_compiling():
            recalled = self.recalled.get(torch._C._current_graph_task_id())
            if recalled is not None:
                return recalled
        return self._running.get()

    @property
    def here(self) -> Call | None:
        """The call that runs in this thread."""
        return self._running.get()

    def begin(self, call: Call | None) -> None:
        """Let this be the running call, in a backward pass that runs a whole forward pass again too."""
        self._running.set(call)
        if self.recalled and call is not None and not torch.compiler.is_compiling():
            backward = torch._C._current_graph_task_id()
            if backward in self.recalled:
                self.recalled[backward] = call

    def forget(self) -> None:
        """Let no call run in this thread."""
        self._running.set(None)

    def recall_from(self, output: Any, call: Call | None) -> None:
        """Let the call be recalled when the gradient of its output arrives."""
        if call is None or torch.compiler.is_compiling():
            return
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self._recall(call))

    def _recall(self, call: Call) -> None:
        """Let the blocks that this backward pass runs again see the call they belong to.

        The call is kept by the pass: passes of several threads share autograd's own, and one may run in several.
        """
        backward = torch._C._current_graph_task_id()
        if backward not in self.recalled:
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._forget, backward))
        self.recalled[backward] = call
        self._running.set(call)

    def _forget(self, backward: int) -> None:
        self.recalled.pop(backward, None)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of a model's output, however nested."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _tensors(item)
