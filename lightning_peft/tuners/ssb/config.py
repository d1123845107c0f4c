"""The configuration of an SSB adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.config import PeftConfig

from lightning_peft.stack.registration import add_peft_type
from lightning_peft.tuners.config import WithCard
from lightning_peft.tuners.targets import order_targets

SIDES = ("both", "input", "output")


@dataclass
class SSBConfig(WithCard, PeftConfig):
    """Vectors that scale a linear layer's weight: `W' = diag(u) W diag(v)`, u and v ones at the start.

    Si, Yang and Shen 2024, arXiv:2407.05417, where this is SSB and its one-sided case SSL. Trained parameters:
    `inputs + outputs` for each layer.

    Args:
        target_modules: the linear layers, by name or suffix; a string is a regular expression, or `"all-linear"`.
            Default: those of the model's blocks.
        sides: `"both"`, `"input"` (v alone: SSL, which is IA3 on a feed-forward layer) or `"output"` (u alone).
        alpha: the dial: `1 + alpha (u - 1)` and `1 + alpha (v - 1)` act.
        exclude_modules: names left out of `target_modules`.
        modules_to_save: other modules to train and save whole, as in every peft method.
        layers_to_transform: the numbers of the blocks in which `target_modules`, given by suffixes, are adapted.
        layers_pattern: the name of the list of blocks, where it is not the first in a module's name.
    """

    target_modules: list[str] | str | None = field(default=None)
    sides: str = field(default="both")
    alpha: float = field(default=1.0)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("SSB")
        order_targets(self)
        if self.sides not in SIDES:
            raise ValueError(f"sides must be one of {', '.join(SIDES)}, got {self.sides!r}.")
