"""A further table of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning_peft.tasks.cell import Cell
from lightning_peft.tasks.measure import Measure


class Section:
    """What is measured beside the task's own measures: side effects, free answers.

    A section of columns that `test_step` returns is a name, a title and their measures; all methods have defaults.

    Attributes:
        name: a word.
        title: of the table.
        measures: of units, by name, in the order of the columns; no name is one of the task's measures.
        unit: what differences are paired by; default the task's.
        price: a sentence on what a row costs, in which `{name}` stands for its value of one of the measures and
            `{name:+}` for its difference to base; by default none.
    """

    name: str
    title: str
    measures: ClassVar[Mapping[str, Measure]]
    unit: str | None = None
    price: str | None = None

    def prepare(self, cells: Sequence[Cell], say: Callable[[str], None]) -> None:
        """Do what is left to do when all cells are finished, such as writing answers with each adapted module.

        Args:
            cells: all of the comparison's, with their results.
            say: is told of progress.
        """

    def scores(self, cells: Sequence[Cell], base: Sequence[Cell]) -> Mapping[str, Mapping[int, float]]:
        """Return the score of each unit of a row, by measure, as far as they were measured.

        Args:
            cells: the row's, one a fold; none has failed.
            base: those of the row that the others are compared with; none where one has failed.
        """
        scores: dict[str, dict[int, float]] = {}
        for cell in cells:
            columns = cell.result.get("columns", {})
            for name in self.measures.keys() & columns.keys():
                values = {int(unit): sum(draws) / len(draws) for unit, draws in columns[name].items()}
                scores.setdefault(name, {}).update(values)
        return scores

    def write(self, output: Path) -> None:
        """Write what is to stand beside `results.json`."""

    def row_results(self, cells: Sequence[Cell]) -> dict[str, Any]:
        """Return what else a row's entry in `results.json` says."""
        return {}

    def results(self) -> dict[str, Any]:
        """Return what else `results.json` says."""
        return {}

    def notes(self, results: Mapping[str, Any]) -> list[str]:
        """Return what to say below the table, given the content of `results.json`."""
        return []

    def below(self, results: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """Return lines to say below values, by row and measure, given the content of `results.json`."""
        return {}
