"""One cell of a comparison, as its task sees it: one row on one fold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_peft.tasks.scoring import Scoring
from lightning_peft.tasks.split import Split


@dataclass(frozen=True)
class Cell:
    """One row on one fold.

    Args:
        row: the row's name.
        label: what the table says of it.
        kind: what sort of adaptation it is, `"base"` where it is what the others are compared with.
        split: of the units.
        folder: what the cell writes stands there.
        options: the row's, as the task's `data` takes them.
        draws: how often demonstrations are drawn.
        adapts: whether the row has a callback.
        tuned: whether that trains, with learning rates.
        scoring: how choices are scored in place of the model's log-probabilities, if they are.
        trainer: makes a Trainer with some callbacks and with options, on the comparison's accelerator.
        adapted: makes the module with what the finished cell has saved.
        result: of the finished cell, what `CellRecords.measure` gave among it; empty before.
        seed: of everything random in it.
    """

    row: str
    label: str
    kind: str
    split: Split
    folder: Path
    options: Mapping[str, Any]
    draws: int
    adapts: bool
    tuned: bool
    scoring: Scoring | None
    trainer: Callable[..., L.Trainer]
    adapted: Callable[[], L.LightningModule]
    result: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def fold(self) -> int:
        """The fold that is tested."""
        return self.split.fold

    @property
    def failed(self) -> bool:
        """Whether it has run and failed."""
        return bool(self.result.get("failed"))

    def options_of(self, draw: int) -> dict[str, Any]:
        """Return the row's options in one of its draws of demonstrations."""
        return {**self.options, "draw": draw} if self.draws > 1 else dict(self.options)

    def test(self, module: L.LightningModule, data: L.LightningDataModule, *callbacks: Callback) -> L.Trainer:
        """Test a module on data, and return the Trainer that did."""
        trainer = self.trainer(list(callbacks))
        trainer.test(module, datamodule=data, verbose=False)
        return trainer
