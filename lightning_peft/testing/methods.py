"""The methods the laws are run on, each with the closed formula for the number of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
from torch import nn

from lightning_peft.callbacks import PEFT, LoRA
from lightning_peft.tuners.modules import base_modules
from lightning_peft.tuners.structure import matrix_shape
from lightning_peft.tuners.targets import choose_targets


@dataclass(frozen=True)
class Method:
    """A method as the table runs it.

    Args:
        make: builds the callback.
        count: the closed formula for the number of trainable parameters, given the bare module.
        needs: what an architecture must have, see `Architecture.has`.
    """

    make: Callable[[], PEFT]
    count: Callable[[L.LightningModule], int] | None = None
    needs: frozenset[str] = frozenset()


def _shapes(backbone: nn.Module, targets: list[str] | str) -> list[tuple[int, int]]:
    """`(inputs, outputs)` of the matrices that these targets name."""
    named = dict(base_modules(backbone))
    ends = tuple(f".{target}" for target in targets)
    return [matrix_shape(m) for name, m in named.items() if name in targets or name.endswith(ends)]


def _sum(terms: Callable[[int, int], int], within: str | None = None) -> Callable[[L.LightningModule], int]:
    """The sum over the default targets of a term in their inputs and outputs."""

    def count(module: L.LightningModule) -> int:
        backbone: nn.Module = module.backbone  # type: ignore[assignment]
        targets = choose_targets(backbone, within=within)  # type: ignore[arg-type]
        return sum(terms(i, o) for i, o in _shapes(backbone, targets))

    return count


METHODS: dict[str, Method] = {
    "LoRA": Method(lambda: LoRA(r=2, backbone="backbone"), _sum(lambda i, o: 2 * (i + o))),
    "rsLoRA": Method(lambda: LoRA(r=2, variant="rslora", backbone="backbone"), _sum(lambda i, o: 2 * (i + o))),
    "DoRA": Method(lambda: LoRA(r=2, variant="dora", backbone="backbone"), _sum(lambda i, o: 2 * (i + o) + o)),
}
