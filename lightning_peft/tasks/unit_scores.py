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

    A column is a measure's score of each unit, or what a measure's function takes, such as `target` and `prediction`: a
    tensor, or a list of numbers or texts.
    Of several processes each has the units of all; a unit that comes again, as samplers of several processes repeat
    some, counts once.

    Attributes:
        columns: by name and unit, once the test has ended.
        returned: what `test_step` returned, in words.

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
        self.columns: dict[str, dict[int, Any]] = {}
        self.returned = "nothing"
        self._here: dict[str, dict[int, Any]] = {}

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._here = defaultdict(dict)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: object
    ) -> None:
        self.returned = _described(outputs)
        if not isinstance(outputs, Mapping) or UNIT not in outputs:
            raise ValueError(
                f"{type(pl_module).__name__}.test_step must return a dict with the number of each unit of its batch, "
                f"{UNIT!r} [B], and a column [B] for each measure; it returned {self.returned}."
            )
        units = _listed(outputs[UNIT])
        for name, values in outputs.items():
            if name != UNIT and len(column := _listed(values)) == len(units):
                self._here[name].update(zip(map(int, units), column, strict=True))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.columns = {}
        for part in reversed(of_all_ranks(dict(self._here))):
            for name, values in part.items():
                self.columns.setdefault(name, {}).update(values)


def _listed(values: Any) -> list[Any]:
    """Return a column `[B]` as a list; of anything else an empty one."""
    if isinstance(values, Tensor):
        return values.tolist() if values.dim() == 1 else []
    return list(values) if isinstance(values, list | tuple) else []


def _described(outputs: Any) -> str:
    if not isinstance(outputs, Mapping):
        return "nothing" if outputs is None else f"a {type(outputs).__name__}"
    shapes = {n: list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for n, v in outputs.items()}
    return ", ".join(f"{name!r} {shape}" for name, shape in shapes.items()) or "an empty dict"
