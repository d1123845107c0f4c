"""The configuration of a singular-values adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.config import PeftConfig

from lightning_peft.stack.registration import add_peft_type
from lightning_peft.tuners.config import WithCard
from lightning_peft.tuners.targets import order_targets


@dataclass
class SingularValuesConfig(WithCard, PeftConfig):
    """Differences of a weight's singular values: `W = U diag(σ) Vᵀ` becomes `U diag(σ + δ) Vᵀ`, δ zero at the start.

    Han et al. 2023, arXiv:2303.11305 (SVDiff), and Peng et al. 2024, arXiv:2308.14604 (SAM-PARSER). Trained parameters:
    `min(inputs, outputs, top)` for each layer. The vectors are computed from the base where they are needed and are in
    no folder; a few numbers of them are, so that other vectors are noticed.

    Args:
        target_modules: the linear layers, by name or suffix; a string is a regular expression, or `"all-linear"`.
            Default: those of the model's blocks.
        top: train only this many of the largest singular values of each weight; None for all.
        nonnegative: let `relu(σ + δ)` act, as SVDiff does, so that no singular value turns negative.
        alpha: the dial: a factor of each difference.
        exclude_modules: names left out of `target_modules`.
        modules_to_save: other modules to train and save whole, as in every peft method.
        layers_to_transform: the numbers of the blocks in which `target_modules`, given by suffixes, are adapted.
        layers_pattern: the name of the list of blocks, where it is not the first in a module's name.
    """

    target_modules: list[str] | str | None = field(default=None)
    top: int | None = field(default=None)
    nonnegative: bool = field(default=False)
    alpha: float = field(default=1.0)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("SINGULAR_VALUES")
        order_targets(self)
        if self.top is not None and self.top < 1:
            raise ValueError(f"top must be at least 1, or None for all singular values, got {self.top}.")
