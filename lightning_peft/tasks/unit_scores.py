"""What a test measures of each unit, gathered while a Trainer runs it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_peft.editing.ranks import of_all_ranks

UNIT = "unit"


class UnitScores(Callback):
    """Keeps what `test_step` returns: a dict with the units' numbers, `unit [B]`, and a column `[B]` under each name.

    A column is a measure's score of each unit, or what a measure's function takes, such as `target` and `prediction`.
    Of several processes each has the units of all; a unit that comes again, as samplers of several processes repeat
    some, counts once.

    Attributes:
        columns: by name and unit, once the test has ended.

    Example:
        >>> class Mine(L.LightningModule):  # doctest: +SKIP
        ...     def test_step(self, batch, batch_idx):
        ...         right = self(batch["x"]).argmax(-1) == batch["y"]
        ...         return {"unit": batch["number"], "accuracy": right.float()}
        >>> scores = UnitScores()  # doctest: +SKIP
        >>> L.Trainer(callbacks=[scores]).test(Mine(), data)  # doctest: +SKIP
        >>> scores.columns["accuracy"]  # doctest: +SKIP
        {0: 1.0, 1: 0.0, ...}
    """

    def __init__(self) -> None:
        self.columns: dict[str, dict[int, float]] = {}
        self._here: dict[str, dict[int, float]] = {}

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._here = defaultdict(dict)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: object
    ) -> None:
        if not isinstance(outputs, Mapping) or UNIT not in outputs:
            raise ValueError(
                f"{type(pl_module).__name__}.test_step must return a dict with the number of each unit of its batch, "
                f"{UNIT!r} [B], and a column [B] for each measure; it returned "
                f"{f'the keys {sorted(outputs)}' if isinstance(outputs, Mapping) else type(outputs).__name__}."
            )
        units = outputs[UNIT].tolist()
        for name, values in outputs.items():
            if name != UNIT and isinstance(values, Tensor) and values.shape == outputs[UNIT].shape:
                self._here[name].update(zip(units, values.tolist(), strict=True))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.columns = {}
        for part in reversed(of_all_ranks(dict(self._here))):
            for name, values in part.items():
                self.columns.setdefault(name, {}).update(values)
