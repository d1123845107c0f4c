"""Search for the largest strength at which something stays within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable

MOST = 20  # strengths that are tried


def largest_within(measure: Callable[[float], float], budget: float, tolerance: float = 0.05) -> dict[float, float]:
    """Return the strengths that were tried and what each was measured at; `chosen` says which of them to take.

    The whole strength, 1, is tried first. Where it is beyond the budget, the search goes on between the largest tried
    strength below which all are within and the smallest that is not. It looks where a power law through these two
    would meet the budget (at first that of KL, which grows with the square of a small strength), and every third time
    in their geometric middle, so that no shape of the curve keeps it from closing in.

    Args:
        measure: returns what a strength in (0, 1] is measured at; NaN and infinity are beyond any budget.
        budget: above 0.
        tolerance: the search ends within this share of the budget, or where the strength is known to half of it.

    Example:
        >>> tried = largest_within(lambda strength: 8 * strength**2, 0.5)
        >>> len(tried), round(chosen(tried, 0.5), 3)
        (2, 0.247)
    """
    tried = {1.0: measure(1.0)}
    while len(tried) < MOST:
        low = chosen(tried, budget)
        value = tried.get(low, 0.0)
        if low == 1.0 or value >= (1 - tolerance) * budget:
            break
        high = min(strength for strength in tried if strength > low)
        if high - low <= tolerance / 2 * high:
            break
        guess = _by_power_law(low, value, high, tried[high], (1 - tolerance / 2) * budget)
        if not low and _is_flat(tried):
            guess = min(guess, high / 8)
        elif low and len(tried) % 3 == 0:
            guess = math.sqrt(low * high)
        margin = (high - low) / 20
        guess = min(max(guess, low + margin), high - margin)
        tried[guess] = measure(guess)
    return dict(sorted(tried.items()))


def chosen(tried: dict[float, float], budget: float) -> float:
    """Return the largest tried strength that is within the budget with all tried below it; 0 where there is none.

    Example:
        >>> chosen({0.25: 0.1, 0.5: 0.9, 0.75: 0.3, 1.0: 2.0}, 0.5)  # not 0.75, beyond which it fell again
        0.25
    """
    low = 0.0
    for strength, value in sorted(tried.items()):
        if not value <= budget:
            break
        low = strength
    return low


def _by_power_law(low: float, low_value: float, high: float, high_value: float, target: float) -> float:
    """Return where a power law through two points meets the target; through one and 0 a square."""
    if not high_value < math.inf:
        return (low + high) / 2
    if low <= 0 or not 0 < low_value < high_value:
        return high * math.sqrt(target / high_value)
    power = math.log(high_value / low_value) / math.log(high / low)
    return low * (target / low_value) ** (1 / power)


def _is_flat(tried: dict[float, float]) -> bool:
    """Return whether the smallest strengths tried are so large that what is measured has almost stopped growing."""
    (one, value), *others = sorted(tried.items())
    return any(
        0 < value < math.inf and math.log(other_value / value) < math.log(other / one)
        for other, other_value in others[:1]
        if 0 < other_value < math.inf
    )
