"""Check an adaptation against every law."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import Tensor

from lightning_peft.backbone.modules import state_tensors
from lightning_peft.fitting.adapter_callback import AdapterCallback
from lightning_peft.testing.cell import Cell, call
from lightning_peft.testing.comparing import DoesNotApply, LawBroken
from lightning_peft.testing.laws import LAWS


@dataclass(frozen=True)
class Outcome:
    """The outcome of one law.

    Args:
        law: its name.
        holds: True, False, or None where it does not apply.
        reason: what is wrong, or why it does not apply.
    """

    law: str
    holds: bool | None
    reason: str = ""


def check_adaptation(
    make_module: Callable[[], L.LightningModule],
    callback: AdapterCallback,
    batches: Sequence[Any] | None = None,
    outputs: Callable[[L.LightningModule, Any], Tensor] = call,
    count: Callable[[L.LightningModule], int] | None = None,
    laws: Collection[str] = tuple(LAWS),
) -> list[Outcome]:
    """Run the laws of adaptation on a method and a module of your own; small ones, since each law makes its own.

    Args:
        make_module: builds the LightningModule; each call must give the same weights.
        callback: the method; it is copied for every law. A law it declares in `exempt` is not asked of it.
        batches: what to train on and look at; default, those of the module's `train_dataloader`. Laws on tokens need
            a dict with `input_ids` and `attention_mask`, both `[B, T]`.
        outputs: gives the tensor to compare, rows first, for a module and a batch; default `module(batch)`.
        count: the closed formula for the number of trainable parameters in the backbone, given the bare module.
        laws: which to check; default all of `LAWS`.

    Returns:
        One outcome a law, in order.

    Raises:
        LawBroken: one or more laws do not hold; the message has a line for each.
        ValueError: the module is not the same each time it is made.

    Example:
        >>> import lightning as L, torch
        >>> from torch import nn
        >>> from lightning_peft.callbacks import LoRA
        >>> from lightning_peft.testing import check_adaptation
        >>> class Classifier(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         torch.manual_seed(0)
        ...         self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        ...     def forward(self, batch):
        ...         return self.net(batch[0])
        ...     def training_step(self, batch, batch_idx):
        ...         return nn.functional.cross_entropy(self(batch), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(self.parameters(), lr=0.01)
        >>> batches = [[torch.randn(5, 4), torch.arange(5) % 3]]
        >>> outcomes = check_adaptation(Classifier, LoRA(r=2), batches, laws=["identity", "off", "merge"])
        >>> [outcome.holds for outcome in outcomes]
        [True, True, True]
    """
    with quietly():
        cell = Cell(make_module, callback, _batches(make_module) if batches is None else batches, outputs, count)
        _check_repeatable(cell)
        outcomes = [check_law(cell, law) for law in laws]
    if broken := [outcome for outcome in outcomes if outcome.holds is False]:
        lines = "\n".join(f"  {outcome.law}: {outcome.reason}" for outcome in broken)
        raise LawBroken(f"{type(callback).__name__} breaks {len(broken)} of {len(outcomes)} laws:\n{lines}")
    return outcomes


def check_law(cell: Cell, law: str) -> Outcome:
    """Check one law on one cell; an error in the middle of it is a law that does not hold."""
    declared = cell.callback.exempt.get(law)
    if declared and law != "merge":  # where merging cannot be, its law asks for a clear error
        return Outcome(law, None, declared)
    try:
        LAWS[law](cell)
    except DoesNotApply as reason:
        return Outcome(law, None, str(reason))
    except LawBroken as error:
        return Outcome(law, False, str(error))
    except Exception as error:
        return Outcome(law, False, f"{type(error).__name__}: {error}")
    return Outcome(law, True)


@contextmanager
def quietly() -> Iterator[None]:
    """Silence what Lightning says of any small run."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _batches(make_module: Callable[[], L.LightningModule]) -> list[Any]:
    return list(make_module().train_dataloader())


def _check_repeatable(cell: Cell) -> None:
    first, second = state_tensors(cell.base()), state_tensors(cell.base())
    if different := [key for key in first if not first[key].equal(second[key])]:
        raise ValueError(f"Two calls of make_module gave different weights in {different[0]}: fix its seed.")
