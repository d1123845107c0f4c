"""What a comparison keeps of a task's cells, and how it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import numpy as np

from lightning_peft.tasks.arguments import described
from lightning_peft.tasks.cell import Cell
from lightning_peft.tasks.first_check import first_check
from lightning_peft.tasks.unit_scores import UnitScores

if TYPE_CHECKING:
    from lightning_peft.tasks.task import Task

Scores = dict[str, dict[int, list[Any]]]  # by column and unit, one value a draw
Columns = Mapping[str, Mapping[int, Any]]  # by name and unit


class CellRecords:
    """The columns of each unit, one value a draw: what a task's cells hold unless the task says otherwise.

    A task of one's own needs nothing here. A subclass, which `Task.records` returns, is for a task that keeps more than
    columns, writes files of its own, or describes its data in its own words.

    Args:
        task: the task.

    Attributes:
        kinds: of the values that `measure` gives, by their names in the cell's `result.json`.
        since_sums: those of them that records of a release without sums do not have.
        files: that `measure` writes into the cell's folder.
        category_measures: the measures, of units and between 0 and 1, that are told by category.
        category_note: a sentence on their intervals.
    """

    kinds: ClassVar[Mapping[str, Any]] = {"columns": dict}
    since_sums: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[str, ...]] = ()
    category_measures: ClassVar[tuple[str, ...]] = ()
    category_note: ClassVar[str] = "Below each mean: Wilson's 95% interval."

    def __init__(self, task: Task) -> None:
        self.task = task

    def depends_on(self, rows: Sequence[Any], seed: int, fold: int) -> Any:
        """Return everything a cell's result depends on, JSON-able.

        Args:
            rows: the settings of the cell's row and of the rows whose adapters it needs.
            seed: of everything random in a cell.
            fold: the cell's.
        """
        return [list(rows), described(self.task), self.task.depends_on(), seed, fold]

    def check_rows(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise `ValueError` in one sentence where the options of rows, by name, do not go with the task."""

    def check(self, rows: Sequence[Cell], missing: Sequence[Cell], cells: Sequence[Cell]) -> None:
        """Raise `ValueError` in one sentence for what would end cells after they have begun.

        Two batches are tested, and one is validated where rows are tuned, so that a measure that `test_step` does not
        return is noticed before anything is trained, as is a module whose learning rate cannot be set.

        Args:
            rows: the first cell of each row.
            missing: the cells that are to be computed.
            cells: all of them.
        """
        if missing:
            first_check(self, missing)

    def measure(self, cell: Cell, module: L.LightningModule) -> dict[str, Any]:
        """Test an adapted module on its cell's units, and return what the cell keeps, JSON-able."""
        columns: Scores = {}
        for draw in range(cell.draws):
            scores = self.scores_of(cell)
            cell.test(module, self.task.data(cell.split, **cell.options_of(draw)), scores)
            for name, values in self.checked(scores).items():
                for unit, value in values.items():
                    columns.setdefault(name, {}).setdefault(unit, []).append(value)
        return {"columns": columns}

    def scores_of(self, cell: Cell) -> UnitScores:
        """Return what gathers a cell's columns while a Trainer tests."""
        return self.task.scores()

    def checked(self, scores: UnitScores) -> Columns:
        """Return the columns of a test.

        Raises:
            ValueError: a measure's column is not among them, or holds a value that is not finite.
        """
        if not scores.columns:
            raise ValueError("The test set is empty: no batch was tested, so that there is nothing to measure.")
        for name, measure in self.task.measures.items():
            for column in (name,) if measure.of_units else measure.columns:
                what = f"the measure {name!r}" if measure.of_units else f"{column!r}, which {name!r} takes"
                if column in scores.misshapen:
                    raise ValueError(f"test_step must return {what} [B]; it returns {scores.misshapen[column]}.")
                if column not in scores.columns:
                    raise ValueError(f"test_step does not return {what} [B]; it returns {scores.returned}.")
                for unit, value in scores.columns[column].items():
                    if measure.of_units and not isinstance(value, Number):
                        raise ValueError(
                            f"The measure {name!r} of {self.task.unit} {unit} is {value!r}: a score is a number."
                        )
                    if isinstance(value, Number) and not math.isfinite(value):  # type: ignore[arg-type]
                        raise ValueError(f"{column!r} of {self.task.unit} {unit} is {value}: scores must be finite.")
        return scores.columns

    def value(self, name: str, columns: Columns) -> float:
        """Return a measure on all units of a test."""
        measure = self.task.measures[name]
        if measure.function is None:
            return float(np.mean(list(columns[name].values())))
        units = sorted(columns[measure.columns[0]])
        return float(measure.function(*(np.array([columns[c][unit] for unit in units]) for c in measure.columns)))

    def units(self, result: Mapping[str, Any]) -> set[int]:
        """Return the units that a finished cell has tested."""
        return {int(unit) for values in result["columns"].values() for unit in values}

    def scores(self, cells: Sequence[Cell]) -> Scores:
        """Return a row's columns from its finished cells, one a fold."""
        scores: Scores = {}
        for cell in cells:
            for name, values in cell.result["columns"].items():
                scores.setdefault(name, {}).update({int(unit): value for unit, value in values.items()})
        return scores

    def check_readable(self, folder: Path, result: Mapping[str, Any]) -> None:
        """Raise `DamagedError` where files that a release without sums wrote cannot be those of the result."""

    def write(self, cells: Sequence[Cell], output: Path) -> None:
        """Write what is to stand beside `results.json`."""

    def describe_data(self, units: int) -> dict[str, Any]:
        """Return the `data` of `results.json`."""
        return {"label": type(self.task).__name__, "units": units, "folds": self.task.folds}

    def describe_model(self) -> dict[str, Any]:
        """Return the `model` of `results.json`."""
        module = self.task.seeded_module(0)
        return {"pretrained": type(module).__name__, "parameters": sum(p.numel() for p in module.parameters())}

    def categories(self, cells: Sequence[Cell]) -> dict[int, str]:
        """Return the category of each unit, where units have some."""
        return {}

    def caveats(self, units: int) -> list[str]:
        """Return sentences on what the numbers do not show."""
        return []

    def cell_caveats(self, cells: Sequence[Cell]) -> list[str]:
        """Return sentences on what the numbers of one row do not show."""
        return []
