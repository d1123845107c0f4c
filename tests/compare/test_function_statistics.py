"""Intervals of functions of all predictions, held against what is known: exact values, means, and simulated truth."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef, roc_auc_score

from lightning_peft.compare.statistics import (
    Interval,
    function_difference,
    function_interval,
    mean_interval,
    paired_difference,
)

# the shares of a population by true class (rows) and predicted class
BINARY = np.array([[0.62, 0.08], [0.10, 0.20]])
RARE = np.array([[0.90, 0.03], [0.03, 0.04]])
THREE = np.array([[0.45, 0.04, 0.03], [0.05, 0.25, 0.03], [0.03, 0.03, 0.09]])
RARE_THIRD = np.array([[0.60, 0.04, 0.01], [0.05, 0.23, 0.01], [0.02, 0.01, 0.03]])


def accuracy(target: Any, prediction: Any) -> float:
    return float(np.mean(target == prediction))


def matthews(shares: np.ndarray) -> float:
    """Return Matthews' correlation of a table of shares or counts."""
    true, predicted, n = shares.sum(1), shares.sum(0), shares.sum()
    spread = math.sqrt((n * n - true @ true) * (n * n - predicted @ predicted))
    return (np.trace(shares) * n - true @ predicted) / spread if spread else 0.0


def macro_f1(shares: np.ndarray) -> float:
    """Return the mean F1 of the classes that are there or are predicted, of a table of shares or counts."""
    sums = shares.sum(0) + shares.sum(1)
    return float((2 * np.diag(shares)[sums > 0] / sums[sums > 0]).mean())


def of_labels(function: Callable[[np.ndarray], float], classes: int) -> Callable[..., float]:
    """Return the function of two columns of labels; scikit-learn's take a hundred times as long."""

    def of_columns(target: np.ndarray, prediction: np.ndarray) -> float:
        counts = np.bincount(target * classes + prediction, minlength=classes**2)
        return function(counts.reshape(classes, classes).astype(float))

    return of_columns


def drawn(shares: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and predictions of units from a population."""
    cells = rng.choice(shares.size, n, p=shares.ravel() / shares.sum())
    return cells // len(shares), cells % len(shares)


@pytest.fixture
def two() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of 200 units, and what two methods predict, of which the first is better."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, 200)
    return target, *(np.where(rng.random(200) < right, target, 1 - target) for right in (0.85, 0.7))


# -- values ---------------------------------------------------------------------------------------------------------


def test_of_a_mean_it_is_the_interval_of_the_mean(two: Any) -> None:
    target, a, b = two
    known, ours = mean_interval(target == a), function_interval((target, a), accuracy)
    assert ours.mean == known.mean and ours.p is None
    assert (ours.low, ours.high) == pytest.approx((known.low, known.high), abs=0.012)
    known, ours = paired_difference(target == a, target == b), function_difference((target, a), (target, b), accuracy)
    assert ours.mean == pytest.approx(known.mean) and ours.p == pytest.approx(known.p, abs=0.015)
    assert (ours.low, ours.high) == pytest.approx((known.low, known.high), abs=0.012)


def test_it_is_scipys_interval(two: Any) -> None:
    target, a, _ = two
    function = of_labels(matthews, 2)
    options: Any = {"n_resamples": 2000, "method": "BCa", "rng": np.random.default_rng(3)}
    theirs = stats.bootstrap((target, a), function, paired=True, vectorized=False, **options).confidence_interval
    ours = function_interval((target, a), function)
    assert ours.mean == pytest.approx(matthews_corrcoef(target, a))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_the_functions_of_scikit_learn_are_taken_as_they_are(two: Any) -> None:
    target, a, _ = two
    names, scores = np.array(["cat", "dog"]), np.random.default_rng(0).random(200) + target / 2
    for columns, function in (
        ((names[target], names[a]), matthews_corrcoef),
        ((target.tolist(), a.tolist()), lambda t, p: f1_score(t, p, average="macro")),
        ((target, scores), roc_auc_score),
    ):
        interval = function_interval(columns, function, resamples=60)
        assert interval.low < interval.mean == function(*columns) < interval.high


def test_a_column_may_hold_a_row_of_numbers_a_unit() -> None:
    rng = np.random.default_rng(0)
    target, probability = rng.integers(0, 3, 60), rng.dirichlet([1, 1, 1], 60)
    interval = function_interval((target, probability), lambda t, p: p[np.arange(len(t)), t].mean())
    assert interval.low < interval.mean < interval.high


def test_units_are_paired(two: Any) -> None:
    target, a, b = two
    paired = function_difference((target, a), (target, b), of_labels(matthews, 2), resamples=300)
    order = np.random.default_rng(1).permutation(200)
    alike = function_difference((target, a), (target[order], a[order]), of_labels(matthews, 2), resamples=300)
    same = function_difference((target, a), (target, a), of_labels(matthews, 2), resamples=300)
    assert same == Interval(0.0, 0.0, 0.0, 1.0) and alike.high - alike.low > 0.1
    assert paired.resolved and 1 / 301 <= paired.p < 0.05


def test_swapping_the_methods_flips_the_sign_and_a_seed_gives_the_same(two: Any) -> None:
    target, a, b = two
    matthews_of = of_labels(matthews, 2)
    forward = function_difference((target, a), (target, b), matthews_of, resamples=300)
    backward = function_difference((target, b), (target, a), matthews_of, resamples=300)
    assert (backward.mean, backward.low, backward.high) == pytest.approx((-forward.mean, -forward.high, -forward.low))
    assert backward.p == forward.p
    intervals = [function_interval((target, a), accuracy, resamples=300, seed=seed) for seed in (3, 3, 4)]
    assert intervals[0] == intervals[1] != intervals[2]


def test_less_confidence_is_a_narrower_interval(two: Any) -> None:
    narrow, wide = (function_interval(two[:2], of_labels(matthews, 2), confidence=c) for c in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_without_any_error_the_interval_has_no_length() -> None:
    labels = np.arange(30) % 2
    assert function_interval((labels, labels), matthews_corrcoef, resamples=50) == Interval(1.0, 1.0, 1.0)


# -- undefined ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["nan", "ValueError", "ZeroDivisionError"])
def test_resamples_in_which_the_function_is_undefined_are_drawn_again(way: str) -> None:
    target = np.arange(12) < 2  # of 12 resampled units none is of the class in 11%

    def recall(target: np.ndarray, score: np.ndarray) -> float:
        if not target.any():
            if way == "nan":
                return math.nan
            raise ValueError if way == "ValueError" else ZeroDivisionError
        return float(score[target].mean())

    score = np.linspace(0, 1, 12)
    with pytest.warns(UserWarning, match=r"recall is undefined on 1\d% of the resamples of 12 units, which were drawn"):
        interval = function_interval((target, score), recall)
    assert interval.low == 0.0 and interval.high == pytest.approx(1 / 11)
    with pytest.warns(UserWarning, match="recall is undefined on"):
        function_difference((target, score), (target, 1 - score), recall)


def test_a_few_undefined_resamples_are_no_warning(two: Any) -> None:
    target = np.arange(60) < 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interval = function_interval((target, np.linspace(0, 1, 60)), roc_auc_score, resamples=200)
    assert math.isfinite(interval.low)


def test_what_has_no_value_at_all_is_one_sentence() -> None:
    ones, score = np.ones(9, int), np.linspace(0, 1, 9)
    with pytest.raises(ValueError, match="roc_auc_score is nan on all 9 units: it has no interval"):
        function_interval((ones, score), roc_auc_score)

    def fails(target: np.ndarray) -> float:
        raise ValueError("no positives")

    with pytest.raises(ValueError, match="fails fails on all 9 units: no positives"):
        function_interval((ones,), fails)

    def once(chosen: np.ndarray) -> float:
        return 1.0 if (chosen == np.arange(9)).all() else math.nan

    with pytest.raises(ValueError, match="once is undefined on nearly all resamples of the 9 units"):
        function_interval((np.arange(9),), once)


def test_a_bug_of_the_function_is_not_taken_for_undefined() -> None:
    with pytest.raises(TypeError):
        function_interval(([1, 0, 1],), accuracy)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([[1, 2, 3], [1, 2]], r"same units, but their lengths are \[2, 3\]"),
        ([[1], [1]], "at least 2 units, but there is 1"),
        ([], "at least one column, but there is none"),
        ([[1, 0, 1], [0.5, math.nan, 1]], "column 1 is not at unit 1"),
        ([3, [1, 2]], "column 0 is a single value"),
    ],
)
def test_wrong_columns_are_one_sentence(columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function_interval(columns, accuracy)
    with pytest.raises(ValueError, match=message):
        function_difference(columns, columns, accuracy)


def test_wrong_arguments_are_one_sentence() -> None:
    for function in (function_interval, lambda c, *a, **k: function_difference(c, c, *a, **k)):
        with pytest.raises(ValueError, match="confidence must lie"):
            function(([1, 2], [1, 2]), accuracy, confidence=95)
        with pytest.raises(ValueError, match="resamples must be"):
            function(([1, 2], [1, 2]), accuracy, resamples=0)


# -- coverage -------------------------------------------------------------------------------------------------------


def coverage(function: Any, shares: np.ndarray, n: int, runs: int, resamples: int = 400) -> float:
    """Return how often 95% intervals of samples from a population cover the population's value."""
    rng, truth, of_columns = np.random.default_rng(0), function(shares), of_labels(function, len(shares))
    hits = 0
    for run in range(runs):
        interval = function_interval(drawn(shares, n, rng), of_columns, resamples=resamples, seed=run)
        hits += interval.low <= truth <= interval.high
    return hits / runs


def test_the_functions_here_are_scikit_learns() -> None:
    target, prediction = drawn(RARE_THIRD, 80, np.random.default_rng(0))
    assert of_labels(matthews, 3)(target, prediction) == pytest.approx(matthews_corrcoef(target, prediction))
    assert of_labels(macro_f1, 3)(target, prediction) == pytest.approx(f1_score(target, prediction, average="macro"))


@pytest.mark.parametrize(("function", "shares"), [(matthews, RARE), (macro_f1, RARE_THIRD)])
def test_an_interval_covers_the_truth_as_often_as_it_says(function: Any, shares: np.ndarray) -> None:
    assert 0.9 < coverage(function, shares, 100, runs=150) <= 1  # 95%, give or take 3 standard errors


def test_a_difference_covers_the_truth_and_is_rarely_found_where_there_is_none() -> None:
    rng, of_columns, hits, rejected = np.random.default_rng(0), of_labels(matthews, 2), 0, 0
    for run in range(200):
        target, a = drawn(BINARY, 100, rng)
        flip = rng.random(100)  # the second method is wrong on other units as often, in the same way
        shares = BINARY / BINARY.sum(1, keepdims=True)
        b = np.where(flip < shares[target, 1], 1, 0)
        difference = function_difference((target, a), (target, b), of_columns, resamples=300, seed=run)
        hits += difference.low <= 0 <= difference.high
        rejected += difference.p < 0.05
    assert 0.9 < hits / 200 < 0.99 and rejected / 200 < 0.1


@pytest.mark.slow
@pytest.mark.sampled(8)
@pytest.mark.parametrize("n", [100, 400])
@pytest.mark.parametrize(
    ("function", "shares"), [(matthews, BINARY), (matthews, RARE), (macro_f1, THREE), (macro_f1, RARE_THIRD)]
)
def test_95_percent_intervals_cover_93_percent_at_least(function: Any, shares: np.ndarray, n: int) -> None:
    share = coverage(function, shares, n, runs=600, resamples=1000)
    print(f"{function.__name__}, n = {n}, rarest class {shares.sum(1).min():.2f}: {share:.3f}")
    assert share >= 0.93
