"""What a test measures of each unit, gathered while a Trainer runs it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_peft.editing.ranks import of_all_ranks, rank_and_count

UNIT = "unit"


class UnitScores(Callback):
    """Keeps what `test_step` returns: a dict with the units' numbers, `unit [B]`, and a column `[B]` under each name.

    A column is a measure's score of each unit, or what a measure's function takes, such as `target` and `prediction`: a
    tensor, or a list of numbers or texts.
    Of several processes each has the units of all; a unit that comes again with the same values, as samplers of several
    processes repeat some, counts once.

    Attributes:
        columns: by name and unit, once the test has ended.
        returned: what `test_step` returned, in words.
        misshapen: what was returned under a name in place of `[B]`, in words, by name.

    Raises:
        ValueError: the numbers of units are not whole, or a number comes again though it cannot be the same unit.

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
        self.misshapen: dict[str, str] = {}
        self._here: dict[str, dict[int, Any]] = {}

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._here, self.misshapen = defaultdict(dict), {}

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: object
    ) -> None:
        self.returned = _described(outputs)
        if not isinstance(outputs, Mapping) or UNIT not in outputs:
            raise ValueError(
                f"{type(pl_module).__name__}.test_step must return a dict with the number of each unit of its batch, "
                f"{UNIT!r} [B], and a column [B] for each measure; it returned {self.returned}."
            )
        step = f"{type(pl_module).__name__}.test_step"
        units = _numbers(outputs[UNIT], step)
        for name, values in outputs.items():
            if name == UNIT:
                continue
            if len(column := _listed(values)) != len(units):
                self.misshapen[name] = f"{_shape(values)} for {len(units)} units"
                continue
            _merge(self._here[name], units, column, step)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.columns = {}
        step = f"{type(pl_module).__name__}.test_step"
        for part in reversed(of_all_ranks(dict(self._here))):
            for name, values in part.items():
                _merge(self.columns.setdefault(name, {}), list(values), list(values.values()), step)


def _numbers(values: Any, step: str) -> list[int]:
    """Return the numbers of a batch's units; raise `ValueError` where they are none."""
    units = _listed(values)
    if not units and _shape(values) not in ("[0]", "a list of 0", "a tuple of 0"):
        raise ValueError(
            f"{step} must return the number of each unit under {UNIT!r}, [B]; it returned {_shape(values)}."
        )
    for unit in units:
        if not isinstance(unit, int | float) or not float(unit).is_integer():
            raise ValueError(
                f"{step} returned {unit!r} as the number of a unit: number units with integers, such as their places "
                "in the data set."
            )
    return [int(unit) for unit in units]


def _merge(known: dict[int, Any], units: list[int], values: list[Any], step: str) -> None:
    """Add a column's values to those of other units.

    Raises:
        ValueError: a unit has a value, and is not repeated by a sampler of several processes.
    """
    several = rank_and_count()[1] > 1
    for unit, value in zip(units, values, strict=True):
        if unit in known and not (several and _same(known[unit], value)):
            raise ValueError(
                f"Unit {unit} was tested twice in one test: {step} must number units across the whole data set, not "
                "within a batch or a process."
            )
        known[unit] = value


def _same(a: Any, b: Any) -> bool:
    """Return whether two values can be one unit's: in batches of other sizes numbers round otherwise."""
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=0.01, abs_tol=0.01) or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


def _listed(values: Any) -> list[Any]:
    """Return a column `[B]` as a list; of anything else an empty one."""
    if isinstance(values, Tensor | np.ndarray):
        return values.tolist() if values.ndim == 1 else []
    return list(map(_plain, values)) if isinstance(values, list | tuple) else []


def _plain(value: Any) -> Any:
    """Return a number of torch or NumPy, which a list may hold, as Python's."""
    return value.item() if isinstance(value, Tensor | np.generic) and value.ndim == 0 else value


def _shape(values: Any) -> str:
    if isinstance(values, Tensor | np.ndarray):
        return str(list(values.shape))
    kind = "None" if values is None else f"a {type(values).__name__}"
    return f"{kind} of {len(values)}" if isinstance(values, list | tuple) else kind


def _described(outputs: Any) -> str:
    if not isinstance(outputs, Mapping):
        return "nothing" if outputs is None else f"a {type(outputs).__name__}"
    shapes = {n: list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for n, v in outputs.items()}
    return ", ".join(f"{name!r} {shape}" for name, shape in shapes.items()) or "an empty dict"
