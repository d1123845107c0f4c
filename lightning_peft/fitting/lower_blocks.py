"""The blocks below an adapter, computed once for texts that are read again and again at other strengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning_peft.backbone.structure import Block, blocks
from lightning_peft.replaced import replaced
from lightning_peft.stack.stack import AdapterStack


def blocks_below(stack: AdapterStack, name: str) -> list[Block]:
    """Return the blocks that compute the same whatever the strength of an adapter: those before the first it is on.

    Returns:
        The blocks of the list that the first one stands in; empty where the adapter is on something outside of
        blocks, acts around calls, or where blocks are compiled or their `forward` is replaced already.
    """
    part, every = stack[name], blocks(stack.backbone)
    places = part.injection.places()
    if part.injection.changes_every_block or part.injection.own_forward is not None or not places:
        return []
    numbers = [[n for n, block in enumerate(every) if f"{place}.".startswith(f"{block.name}.")] for place in places]
    if not all(numbers):
        return []
    first = every[min(number for found in numbers for number in found)]
    below = [block for block in every if block.stack == first.stack and block.number < first.number]
    modules = [block.module for block in below]
    compiled = any(module._compiled_call_impl is not None for module in (stack.backbone, *modules))
    return [] if compiled or any("forward" in module.__dict__ for module in modules) else below


class LowerBlocks:
    """What the last of some blocks gave in calls of the model, and calls of it without them.

    Args:
        below: adjacent blocks from the first on, as `blocks_below` gives them.
    """

    def __init__(self, below: list[Block]) -> None:
        self.below = below

    @contextmanager
    def kept(self, outputs: list[Any]) -> Iterator[None]:
        """Note what the blocks give in a call inside; nothing where there are none."""
        hook: Callable[..., None] = lambda module, args, output: outputs.append(output)  # noqa: E731
        handles = [self.below[-1].module.register_forward_hook(hook)] if self.below else []
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def left_out(self, outputs: list[Any]) -> Iterator[None]:
        """Give in calls inside what was noted, without computing it."""
        handles = [replaced(b.module, "forward", partial(_given, outputs), instead=True) for b in self.below if outputs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _given(outputs: list[Any], *_: Any, **__: Any) -> Any:
    return outputs[-1]
