"""Intervals, p-values and detectable differences over units."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lightning_peft.compare.statistics import Interval, holm, mean_interval, minimal_detectable, paired_difference


@pytest.fixture
def scores() -> tuple[np.ndarray, np.ndarray]:
    """Two methods on 300 units that share the unit's difficulty."""
    rng = np.random.default_rng(1)
    difficulty = rng.normal(0.5, 0.2, 300)
    return difficulty + 0.03 + rng.normal(0, 0.1, 300), difficulty + rng.normal(0, 0.1, 300)


def test_agrees_with_scipys_paired_bootstrap(scores):
    a, b = scores
    ours = paired_difference(a, b, resamples=4000)
    theirs = stats.bootstrap(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(7),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.mean == pytest.approx((a - b).mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.1 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.1 * width)


def test_p_agrees_with_the_paired_t_test(scores):
    a, b = scores
    for shift in (0.0, 0.02, 0.03):
        expected = stats.ttest_rel(a - shift, b).pvalue
        assert paired_difference(a - shift, b).p == pytest.approx(expected, abs=0.02)


def test_exact_distribution_of_two_units():
    # Differences 1 and 3: a resampled mean is 1, 2 or 3 with probability 1/4, 1/2, 1/4, none 2 or more away from 2.
    interval = paired_difference([1.0, 3.0], [0.0, 0.0], resamples=999)
    assert (interval.mean, interval.low, interval.high) == (2.0, 1.0, 3.0)
    assert interval.p == 1 / 1000
    # Differences 0 and 2: the ends 0 and 2 lie exactly as far from the mean 1 as 0 does, so about half of them count.
    assert paired_difference([0.0, 2.0], [0.0, 0.0], resamples=999).p == pytest.approx(0.5, abs=0.06)


def test_equal_scores_are_no_difference():
    assert paired_difference([0.2, 0.4, 0.9], [0.2, 0.4, 0.9]) == Interval(0.0, 0.0, 0.0, 1.0)


def test_a_constant_difference_is_certain():
    interval = paired_difference([1, 1, 1], [0, 0, 0], resamples=99)
    assert interval == Interval(1.0, 1.0, 1.0, 0.01)
    assert minimal_detectable([1, 1, 1], [0, 0, 0]) == 0.0


def test_the_same_seed_gives_the_same_interval(scores):
    assert paired_difference(*scores, seed=3) == paired_difference(*scores, seed=3)
    assert paired_difference(*scores, seed=3) != paired_difference(*scores, seed=4)


def test_swapping_the_methods_flips_the_sign(scores):
    a, b = scores
    forward, backward = paired_difference(a, b), paired_difference(b, a)
    assert (backward.mean, backward.low, backward.high) == pytest.approx((-forward.mean, -forward.high, -forward.low))
    assert backward.p == forward.p


def test_pairing_narrows_the_interval(scores):
    a, b = scores
    paired = paired_difference(a, b)
    shuffled = paired_difference(a, np.random.default_rng(0).permutation(b))
    assert paired.high - paired.low < 0.7 * (shuffled.high - shuffled.low)


@pytest.mark.parametrize("binary", [False, True])
def test_covers_the_true_difference_as_often_as_it_says(binary):
    rng, hits, runs = np.random.default_rng(0), 0, 400
    for run in range(runs):
        if binary:
            a, b, truth = rng.random(80) < 0.6, rng.random(80) < 0.4, 0.2
        else:
            a, b, truth = rng.normal(0.1, 1, 80), rng.normal(0, 1, 80), 0.1
        interval = paired_difference(a, b, resamples=400, seed=run)
        hits += interval.low <= truth <= interval.high
    assert 0.91 < hits / runs < 0.98  # 95%, give or take 3 standard errors and the slight narrowness at n = 80


def test_rarely_rejects_without_a_difference():
    rng = np.random.default_rng(0)
    rejected = [paired_difference(*rng.normal(size=(2, 80)), resamples=400, seed=run).p < 0.05 for run in range(400)]
    assert np.mean(rejected) < 0.09


def test_mean_interval_is_close_to_the_normal_one(scores):
    a, _ = scores
    interval = mean_interval(a)
    standard_error = a.std(ddof=1) / math.sqrt(a.size)
    assert interval.p is None
    assert (interval.low, interval.high) == pytest.approx(
        (a.mean() - 1.96 * standard_error, a.mean() + 1.96 * standard_error), abs=0.1 * standard_error
    )


def test_less_confidence_is_a_narrower_interval(scores):
    narrow, wide = mean_interval(scores[0], confidence=0.8), mean_interval(scores[0], confidence=0.99)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


@pytest.mark.parametrize(("discordance", "expected"), [(0.05, 0.022), (0.10, 0.031), (0.20, 0.044)])
def test_minimal_detectable_of_binary_scores(discordance, expected):
    n = 817
    half = round(discordance * n / 2)
    a, b = np.ones(n), np.ones(n)
    b[:half], a[half : 2 * half] = 0, 0
    assert minimal_detectable(a, b) == pytest.approx(expected, abs=5e-4)
    assert minimal_detectable(a, b) == pytest.approx(2.8 * math.sqrt(2 * half / n / n), rel=2e-3)


def test_a_detectable_difference_is_found_with_the_stated_power():
    rng, found = np.random.default_rng(0), []
    for run in range(400):
        noise = rng.normal(0, 1, 100)
        true_difference = 2.8 / math.sqrt(100)
        found.append(paired_difference(noise + true_difference, np.zeros(100), resamples=400, seed=run).resolved)
    assert np.mean(found) == pytest.approx(0.8, abs=0.07)


def test_more_power_needs_a_larger_difference(scores):
    assert minimal_detectable(*scores, power=0.9) > minimal_detectable(*scores)


def drawn(rng, draws, units=60, spread=0.3):
    """Scores of several draws, each a little better or worse on all units alike."""
    return rng.normal(0, spread, (draws, 1)) + rng.normal(0, 0.5, (draws, units))


def test_few_draws_are_averaged_and_one_draw_is_no_draw():
    a, b = drawn(np.random.default_rng(0), 4), np.zeros(60)
    assert paired_difference(a, b) == paired_difference(a.mean(0), b)
    assert minimal_detectable(a, b) == minimal_detectable(a.mean(0), b)
    assert mean_interval(a[:1]) == mean_interval(a[0])


@pytest.mark.parametrize("draws", [5, 8])
def test_an_interval_of_many_draws_covers_what_other_draws_would_give(draws):
    rng, hits, blind = np.random.default_rng(0), 0, 0
    for run in range(200):
        scores = drawn(rng, draws)
        interval, held = (mean_interval(x, resamples=400, seed=run) for x in (scores, scores.mean(0)))
        hits += interval.low <= 0 <= interval.high
        blind += held.low <= 0 <= held.high
    # a percentile bootstrap of so few draws is somewhat narrow, but nothing like one that takes them as given
    assert hits / 200 > 0.82 > 0.7 > blind / 200


def test_draws_are_paired_and_where_they_cannot_be_their_means_are():
    a = drawn(np.random.default_rng(0), 6)
    assert paired_difference(a + 0.1, a).low == pytest.approx(0.1)
    assert paired_difference(a, a[:5]) == paired_difference(a.mean(0), a[:5].mean(0))
    assert paired_difference(a, a[:1]) == paired_difference(a, a[0])


def test_other_draws_make_less_detectable():
    a = drawn(np.random.default_rng(0), 6)
    assert minimal_detectable(a, np.zeros(60)) > 2 * minimal_detectable(a.mean(0), np.zeros(60))


def test_holm_by_hand():
    # Sorted .005 .01 .03 .04 by 4 3 2 1 is .02 .03 .06 .04, and an adjusted value never falls below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_never_exceeds_one_and_of_one_changes_nothing():
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 2, 3], [1, 2], r"same units.*\(3,\) and \(2,\)"),
        ([1], [1], "at least 2 units, but there is 1"),
        ([], [], "at least 2 units, but there is 0"),
        ([1, math.nan, 3], [1, 2, 3], "1 of 3 are not, the first at unit 1"),
        ([1, 2, 3], [1, 2, math.inf], "first at unit 2"),
        ([[[1, 2]]], [[[1, 2]]], r"shape \[n\] or \[draws, n\]"),
        ([[1, 2], [1, math.nan]], [1, 2], "1 of 4 are not, the first at unit 1"),
    ],
)
def test_wrong_scores_are_one_sentence(a, b, message):
    for function in (paired_difference, minimal_detectable):
        with pytest.raises(ValueError, match=message):
            function(a, b)


def test_wrong_arguments_are_one_sentence():
    with pytest.raises(ValueError, match="confidence must lie"):
        mean_interval([1, 2], confidence=95)
    with pytest.raises(ValueError, match="resamples must be"):
        mean_interval([1, 2], resamples=0)
    with pytest.raises(ValueError, match="power must lie"):
        minimal_detectable([1, 2], [2, 2], power=80)
    with pytest.raises(ValueError, match="p-values must lie"):
        holm([0.5, math.nan])
