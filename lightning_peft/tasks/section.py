"""A further table of a comparison."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning_peft.tasks.measure import Measure


class Section(ABC):
    """What is measured beside the task's own measures: side effects, free answers.

    Attributes:
        title: of the table.
        measures: by name, in the order of the columns.
    """

    title: str
    measures: ClassVar[Mapping[str, Measure]]

    def scores(self, cells: Sequence[Mapping[str, Any]]) -> Mapping[str, Mapping[int, float]]:
        """Return the score of each unit of a row by measure, from the results of its finished cells, one a fold."""
        return {}

    def notes(self, results: Mapping[str, Any]) -> list[str]:
        """Return what to say below the table, given the content of `results.json`."""
        return []
