"""A value with its interval."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean, or a function of all units' predictions, with its bootstrap interval.

    Args:
        mean: The mean over units, in the unit of the scores it came from, or the function's value on all units.
        low: Lower end of the interval.
        high: Upper end of the interval.
        p: Two-sided p-value of "it is 0", in (0, 1]; ``None`` where 0 is not a hypothesis (a single score).

    Examples:
        >>> Interval(mean=0.05, low=0.01, high=0.09, p=0.02).resolved
        True
    """

    mean: float
    low: float
    high: float
    p: float | None = None

    @property
    def resolved(self) -> bool:
        """Return whether the interval excludes 0, so that the sign of the mean is known at its confidence."""
        return self.low > 0 or self.high < 0
