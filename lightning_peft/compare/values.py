"""Measures of rows and differences between rows, from their units' columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_peft.compare import statistics
from lightning_peft.compare.statistics import Interval, mean_interval, minimal_detectable, paired_difference
from lightning_peft.tasks.cell_records import Scores
from lightning_peft.tasks.measure import Measure


def has_measure(measure: Measure, name: str, scores: Scores) -> bool:
    """Return whether a row's columns have what a measure takes."""
    return all(scores.get(column) for column in (measure.columns or (name,)))


def value_of(measure: Measure, name: str, scores: Scores) -> tuple[Interval, list[float]]:
    """Return a measure on all units with its interval, and its value in each draw of demonstrations."""
    if measure.function is None:
        by_draw = _by_draw(scores[name], scores[name])
        return mean_interval(by_draw), by_draw.mean(1).tolist()
    columns, function = _Predictions(measure, [scores]), measure.function
    interval = statistics.function_interval(columns.of(0), columns.function)
    return interval, [float(function(*draw)) for draw in columns.draws[0]]


def difference_of(measure: Measure, name: str, a: Scores, b: Scores) -> dict[str, float | None]:
    """Return the paired difference of a measure, over the units that both rows have."""
    if measure.function is None:
        shared = sorted(a[name].keys() & b[name].keys())
        x, y = _by_draw(a[name], shared), _by_draw(b[name], shared)
        change, detectable = paired_difference(x, y), minimal_detectable(x, y)
    else:
        columns = _Predictions(measure, [a, b])
        change = statistics.function_difference(columns.of(0), columns.of(1), columns.function)
        detectable = None
    return {
        "mean": change.mean,
        "low": change.low,
        "high": change.high,
        "p": change.p,
        "mde": detectable,
    }


class _Predictions:
    """The columns that a measure's function takes, of one row or of two, on the units that all have.

    Units are resampled by their places, so that columns may be of any type, and all draws of a unit stay together: the
    function of several draws is its mean over them.

    Args:
        measure: with a function.
        rows: the columns of each row.
    """

    def __init__(self, measure: Measure, rows: Sequence[Scores]) -> None:
        assert measure.function is not None
        self._function = measure.function
        shared = set.intersection(*({*row[column]} for row in rows for column in measure.columns))
        self.units = sorted(shared)
        self.draws = [self._of_row(row, measure.columns) for row in rows]

    def of(self, row: int) -> list[NDArray[np.int64]]:
        """Return a row's one column: the place of each unit, counted through all rows."""
        return [np.arange(len(self.units)) + row * len(self.units)]

    def function(self, places: NDArray[np.int64]) -> float:
        """Return the measure on the units at these places, which are all of one row."""
        count = len(self.units)
        chosen = np.asarray(places) % count
        draws = self.draws[int(places[0]) // count]
        return float(np.mean([self._function(*(column[chosen] for column in columns)) for columns in draws]))

    def _of_row(self, row: Scores, names: Sequence[str]) -> list[list[NDArray[Any]]]:
        count = min(len(row[names[0]][unit]) for unit in self.units)
        return [[np.array([row[name][unit][draw] for unit in self.units]) for name in names] for draw in range(count)]


def _by_draw(values: Mapping[int, list[Any]], units: Iterable[int]) -> NDArray[np.float64]:
    """Return the scores of some units, `[draws, n]`."""
    return np.array([values[unit] for unit in units]).T
