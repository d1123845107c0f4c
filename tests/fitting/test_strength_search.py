"""The search for a strength never passes its budget, is the same each time, and ends."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from lightning_peft.fitting.strength_search import MOST, chosen, largest_within

CURVES: dict[str, Callable[[float], float]] = {
    "square": lambda s: 9 * s**2,
    "steep": lambda s: 50 * s**4,
    "saturated": lambda s: 9 * (1 - math.exp(-((200 * s) ** 2))),
    "hockey stick": lambda s: 0.01 * s if s < 0.3 else 9.0,
    "wave": lambda s: 3 * math.sin(7 * s) ** 2 + 2 * s**2,
    "stairs": lambda s: round(4 * s, 1),
    "not a number from a half on": lambda s: s**2 if s < 0.5 else math.nan,
    "infinite from a half on": lambda s: s**2 if s < 0.5 else math.inf,
}


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
@pytest.mark.parametrize("budget", [0.05, 0.5])
def test_it_ends_within_the_budget_and_near_it(curve: Callable[[float], float], budget: float) -> None:
    tried = largest_within(curve, budget)
    strength = chosen(tried, budget)
    assert len(tried) <= MOST and tried == largest_within(curve, budget)
    assert strength > 0 and all(curve(s) <= budget for s in tried if s <= strength)
    beyond = min(s for s in tried if s > strength)
    assert curve(strength) >= 0.95 * budget or beyond <= 1.03 * strength


def test_a_whole_strength_within_the_budget_is_tried_alone() -> None:
    assert largest_within(lambda s: 0.1 * s, 0.5) == {1.0: 0.1}
    assert largest_within(lambda s: 0.0, 0.5) == {1.0: 0.0}


def test_a_strength_beyond_one_that_was_too_much_is_not_taken() -> None:
    assert chosen({0.2: 0.1, 0.4: 0.6, 0.6: 0.2, 1.0: 3.0}, 0.5) == 0.2
    assert chosen({0.2: 0.6, 1.0: 0.1}, 0.5) == 0.0


def test_where_nothing_is_within_the_budget_it_ends_all_the_same() -> None:
    tried = largest_within(lambda s: 1.0, 0.5)
    assert len(tried) == MOST and chosen(tried, 0.5) == 0.0
    assert chosen(largest_within(lambda s: math.nan, 0.5), 0.5) == 0.0


def test_kl_that_grows_with_the_square_takes_few_tries() -> None:
    assert len(largest_within(lambda s: 9 * s**1.9, 0.5)) <= 4
