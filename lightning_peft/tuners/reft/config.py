"""The configuration of a ReFT adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft.config import PeftConfig

from lightning_peft.positions import check_policy
from lightning_peft.stack.registration import add_peft_type
from lightning_peft.tuners.config import WithCard
from lightning_peft.tuners.reft.edit import ACTIVATIONS
from lightning_peft.tuners.targets import order_targets


@dataclass
class ReftConfig(WithCard, PeftConfig):
    """An edit of rank r of the output `h [B, T, width]` of some modules, at the positions that are chosen.

    LoReFT: `h + alpha * Rᵀ(W h + b - R h)`, where the rows of R `[r, width]` are orthonormal. DiReFT without the
    difference and without orthonormal rows: `h + alpha * Rᵀ(W h + b)`. Wu et al. 2024, arXiv:2404.03592, equations 2
    and 4.

    Args:
        target_modules: the modules, by full name or suffix; a string is a regular expression. Of a tuple that one
            gives the first element is edited.
        width: of their output.
        r: the rank.
        orthogonal: whether the rows of R are orthonormal.
        subtract: whether `R h` is subtracted.
        activation: a function of `W h + b`: `"linear"` for none, `"relu"`, `"gelu"`, `"swish"` or `"tanh"`.
        alpha: the strength.
        dropout: on the change, in training.
        positions: the edited tokens, in the language of `lightning_peft.tokens`; several selections are joined by `+`,
            such as `"prompt[0:7]+prompt[-7:]"`.
        share_weights: whether all selections are edited by the same R, W and b. Else each has its own, and a token of
            several selections is edited by the last.
        init_reft_weights: True: an untrained adapter changes nothing; W begins as R where that is subtracted, else as
            zero, b as zero. `"paper"`: W and b begin as those of a linear layer, as in the authors' code, whose
            untrained adapter is an edit at random.
        exclude_modules: names left out of `target_modules`.
        modules_to_save: other modules to train and save whole, as in every peft method.
        layers_to_transform: the numbers of the blocks in which `target_modules`, given by suffixes, are adapted.
        layers_pattern: the name of the list of blocks, where it is not the first in a module's name.
    """

    target_modules: list[str] | str | None = field(default=None)
    width: int | None = field(default=None)
    r: int = field(default=8)
    orthogonal: bool = field(default=True)
    subtract: bool = field(default=True)
    activation: str = field(default="linear")
    alpha: float = field(default=1.0)
    dropout: float = field(default=0.0)
    positions: str = field(default="prompt[0:7]+prompt[-7:]")
    share_weights: bool = field(default=True)
    init_reft_weights: bool | Literal["paper"] = field(default=True)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("REFT")
        order_targets(self)
        for policy in self.selections:
            check_policy(policy)
        if self.r < 1:
            raise ValueError(f"The rank r must be at least 1, got {self.r}.")
        if self.orthogonal and self.width is not None and self.r > self.width:
            raise ValueError(
                f"There are no r={self.r} orthonormal rows of width {self.width}: r must be at most {self.width}."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}.")
        if self.init_reft_weights is not True and self.init_reft_weights != "paper":
            raise ValueError(f'init_reft_weights must be True or "paper", got {self.init_reft_weights!r}.')
        if self.init_reft_weights is True and self.subtract and self.activation != "linear":
            raise ValueError(
                f"With activation={self.activation!r} no W gives what is subtracted, so that the adapter cannot begin "
                'as nothing: choose activation="linear", or the authors\' start, init_reft_weights="paper".'
            )

    @property
    def selections(self) -> list[str]:
        """The selections of tokens that `positions` joins."""
        return [policy.strip() for policy in self.positions.split("+")]

    @property
    def units(self) -> int:
        """The number of edits, with R, W and b each, of one module."""
        return 1 if self.share_weights else len(self.selections)
