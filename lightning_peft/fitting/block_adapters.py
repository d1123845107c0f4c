"""The parameters of adapters block by block, and their strength in some blocks for a while."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.structure import blocks
from lightning_peft.stack.adapter import Adapter
from lightning_peft.stack.stack import AdapterStack

Parameters = dict[str, nn.Parameter]


@dataclass(frozen=True)
class BlockAdapter:
    """What is trained of adapters in one block.

    Args:
        name: the block's, e.g. `model.layers.3`.
        module: the block.
        parameters: by their names in the backbone.
    """

    name: str
    module: nn.Module
    parameters: Parameters


def by_block(stack: AdapterStack, names: Sequence[str]) -> list[BlockAdapter]:
    """Return the trained parameters of adapters by the blocks that hold them; blocks without any are left out.

    Parameters in no block, or in several, as those that blocks share, belong to none.

    Args:
        stack: the adapters of a backbone.
        names: of the adapters that are meant.
    """
    every = {name: p for part in names for name, p in stack.parameters(stack[part]).items() if p.requires_grad}
    found = blocks(stack.backbone)
    inside = [{id(parameter) for parameter in block.module.parameters()} for block in found]
    holders = Counter(number for numbers in inside for number in numbers)
    held = [
        BlockAdapter(block.name, block.module, {n: p for n, p in every.items() if id(p) in ids and holders[id(p)] == 1})
        for block, ids in zip(found, inside, strict=True)
    ]
    return [block for block in held if block.parameters]


def has_dial(part: Adapter) -> bool:
    """Return whether an adapter's strength can be set layer by layer."""
    return bool(part.scaling) or part.injection.start is not None


@contextmanager
def suppressed(
    stack: AdapterStack, names: Sequence[str], chosen: Collection[BlockAdapter], factor: float
) -> Iterator[None]:
    """Multiply the strength of adapters in some blocks by a factor; afterwards each layer's is, bit for bit, as it was.

    Where layers have a scaling, that is the strength. Else the parameters are moved towards the value they start at.

    Args:
        stack: the adapters of a backbone, none of them merged.
        names: of the adapters that are meant; each `has_dial`.
        chosen: the blocks.
        factor: 0 leaves nothing of the adapters there.
    """
    inside = {module for block in chosen for module in block.module.modules()}
    scalings: list[tuple[Any, str, Any]] = []
    values: list[tuple[nn.Parameter, float, Tensor]] = []
    for part in (stack[name] for name in names):
        scalings += [(m.scaling, part.name, m.scaling[part.name]) for m in part.scaling if m in inside]
        if (start := part.injection.start) is not None and not part.scaling:
            ours = set(stack.parameters(part))
            moved = [p for block in chosen for name, p in block.parameters.items() if name in ours]
            values += [(parameter, start, parameter.detach().clone()) for parameter in moved]
    try:
        for scaling, name, before in scalings:
            scaling[name] = before * factor
        with torch.no_grad():
            for parameter, start, _ in values:
                parameter.sub_(start).mul_(factor).add_(start)
        yield
    finally:
        for scaling, name, before in scalings:
            scaling[name] = before
        with torch.no_grad():
            for parameter, _, kept in values:
                parameter.copy_(kept)
