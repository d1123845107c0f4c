"""One thing that a comparison measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A score of each unit (accuracy, a negative log-likelihood), or a function of all units' predictions.

    Args:
        label: the heading of its column.
        meaning: what its numbers are.
        better: the sign of a change for the better, 1 or -1.
        range: the least and the largest value there can be; None where there is no such bound.
        written: how a value is written: a format such as `".3f"`; default `.451`, without the zero before the point.
        columns: what `function` is given, names of what `test_step` returns for each unit, such as
            `("target", "prediction")`; empty for a score of each unit, which `test_step` returns under the measure's
            own name.
        function: of one sequence for each column, all units in the same order, such as
            `sklearn.metrics.matthews_corrcoef`. Its interval is bootstrapped over units.

    Raises:
        ValueError: `better` is not 1 or -1, or there is a function without columns or columns without a function.

    Example:
        >>> from sklearn.metrics import matthews_corrcoef
        >>> accuracy = Measure("Accuracy", "share of images told right", range=(0, 1))
        >>> mcc = Measure("MCC", "Matthews' correlation", range=(-1, 1), columns=("target", "prediction"),
        ...               function=matthews_corrcoef)
        >>> accuracy.of_units, mcc.of_units
        (True, False)
    """

    label: str
    meaning: str
    better: int = 1
    range: tuple[float | None, float | None] = (None, None)
    written: str = ""
    columns: tuple[str, ...] = ()
    function: Callable[..., float] | None = None

    def __post_init__(self) -> None:
        if self.better not in (1, -1):
            raise ValueError(f"better of the measure {self.label!r} must be 1 or -1, got {self.better!r}.")
        if (self.function is None) != (not self.columns):
            raise ValueError(
                f"The measure {self.label!r} has {'no function' if self.function is None else 'a function'} and the "
                f"columns {self.columns}: give a function and the names of the columns it takes, or neither."
            )

    def as_dict(self) -> dict[str, Any]:
        """Return how it is told in `results.json`."""
        names = ("label", "meaning", "better", "range", "written")
        return {name: getattr(self, name) for name in names} | {"range": list(self.range)}

    @property
    def of_units(self) -> bool:
        """Return whether each unit has a score, of which the measure is the mean."""
        return self.function is None
