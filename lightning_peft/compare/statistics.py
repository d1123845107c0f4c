"""Intervals, p-values and detectable differences for scores that are paired by unit: a question, an image, a document.

Every method is scored on the same units, so methods are compared by the mean of the differences by unit. Pairing
removes what makes a unit hard for all methods, which is most of the variance (Miller 2024, "Adding Error Bars to
Evals", arXiv:2411.00640). `function_interval` and `function_difference` are for what is no mean of units' scores.

Where a method was scored several times, with other demonstrations each, its scores are `[draws, n]`. From 5 draws on an
interval is that of a two-level bootstrap, which resamples draws and units. Fewer do not tell how draws vary: then a
unit's score is its mean over draws, and the interval holds for these draws only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap, norm

from lightning_peft.compare.function_statistics import function_difference as function_difference
from lightning_peft.compare.function_statistics import function_interval as function_interval
from lightning_peft.compare.interval import Interval as Interval

MIN_DRAWS = 5  # fewer do not tell how draws vary
_CHUNK = 1 << 20  # resampled scores held at once: 8 MiB of float64, whatever the number of units


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the mean of ``a - b`` over units, with a paired percentile bootstrap interval and a two-sided p-value.

    Units are resampled, so both scores of a unit stay together. ``p = (1 + #) / (1 + resamples)``, where ``#``
    counts resampled means that lie at least as far from the observed mean as the observed mean lies from 0: the
    bootstrap distribution moved to the null hypothesis (Hall & Wilson 1991, *Biometrics* 47). The interval and ``p``
    agree except close to the border. The same seed and numbers of units and draws give the same resamples, so
    differences within one table share them.

    Args:
        a: Scores of the first method, shape ``[n]``, one a unit, or ``[draws, n]``.
        b: Scores of the second method on the same units in the same order, shape ``[n]`` or ``[draws, n]``; as
            many draws are paired too, of unlike numbers the means count.
        confidence: Coverage of the interval, in (0, 1).
        resamples: Number of bootstrap resamples, at least 1.
        seed: Seed of the resampling.

    Returns:
        The mean difference, in the unit of the scores, with interval and p-value.

    Raises:
        ValueError: Lengths differ, fewer than 2 units, a score is not finite, or an argument is out of range.

    Examples:
        >>> difference = paired_difference([1, 1, 1, 0, 1, 1], [0, 1, 0, 0, 0, 0])
        >>> round(difference.mean, 3), difference.resolved
        (0.667, True)
        >>> paired_difference([1, 0, 1], [1, 0, 1]).p
        1.0
    """
    difference = _differences(a, b)
    mean, low, high, means = _bootstrap(difference, confidence, resamples, seed)
    # A resample of 0/1 scores often ties exactly with the observed mean; rounding must not decide which side it is on.
    tolerance = 1e-12 * float(np.abs(difference).max())
    extreme = int(np.count_nonzero(np.abs(means - mean) >= abs(mean) - tolerance))
    return Interval(mean, low, high, (1 + extreme) / (1 + resamples))


def mean_interval(a: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean of the scores over units with a percentile bootstrap interval; ``p`` is ``None``.

    Two of these intervals may overlap although the difference is resolved: compare by :func:`paired_difference`.

    Args:
        a: Scores, shape ``[n]``, one a unit, or ``[draws, n]``.
        confidence: Coverage of the interval, in (0, 1).
        resamples: Number of bootstrap resamples, at least 1.
        seed: Seed of the resampling.

    Returns:
        The mean, in the unit of the scores, with its interval.

    Raises:
        ValueError: Fewer than 2 units, a score is not finite, or an argument is out of range.

    Examples:
        >>> interval = mean_interval([0, 1, 1, 1])
        >>> interval.mean, interval.low <= 0.75 <= interval.high
        (0.75, True)
    """
    mean, low, high, _ = _bootstrap(_scores(a), confidence, resamples, seed)
    return Interval(mean, low, high)


def minimal_detectable(a: ArrayLike, b: ArrayLike, power: float = 0.8) -> float:
    r"""Return the smallest true difference that a two-sided 5% test finds here with probability ``power``.

    :math:`(z_{.975} + z_{power})\, sd(a - b) / \sqrt n`, which at 80% power is 2.8 standard errors (Bloom 1995,
    *Evaluation Review* 19; for paired evaluations Miller 2024, arXiv:2411.00640). For 0/1 scores
    :math:`sd^2 = discordance - mean^2`, so this is ``2.8 * sqrt(discordance / n)`` but for the squared mean, where
    ``discordance`` is the share of units on which the methods disagree.

    Args:
        a: Scores of the first method, shape ``[n]``, one a unit, or ``[draws, n]``.
        b: Scores of the second method on the same units in the same order, shape ``[n]`` or ``[draws, n]``.
        power: Probability of finding the difference, in (0, 1).

    Returns:
        The difference, in the unit of the scores; 0 where both methods differ by the same amount on every unit.

    Raises:
        ValueError: Lengths differ, fewer than 2 units, a score is not finite, or ``power`` is out of range.

    Examples:
        Of 800 units the methods disagree on 80, half in either direction:

        >>> a, b = [1] * 40 + [0] * 40 + [1] * 720, [0] * 40 + [1] * 40 + [1] * 720
        >>> round(minimal_detectable(a, b), 3)
        0.031
    """
    if not 0 < power < 1:
        raise ValueError(f"power must lie between 0 and 1, but is {power}.")
    difference = _differences(a, b)
    by_unit = difference.mean(0) if difference.ndim == 2 else difference
    variance = by_unit.var(ddof=1) / by_unit.size
    if difference.ndim == 2:
        variance += difference.mean(1).var(ddof=1) / len(difference)
    return float((norm.ppf(0.975) + norm.ppf(power)) * math.sqrt(variance))


def holm(pvalues: Sequence[float]) -> list[float]:
    """Correct p-values by Holm's step-down method, so that they hold for the whole family at once, in the order given.

    Args:
        pvalues: One p-value in [0, 1] a hypothesis, such as "method k differs from base" for every method.

    Returns:
        Adjusted p-values in [0, 1]; rejecting those below 5% keeps the chance of any false rejection below 5%
        (Holm 1979, *Scandinavian Journal of Statistics* 6).

    Raises:
        ValueError: A p-value is not in [0, 1].

    Examples:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(pvalues, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():  # false for NaN too
        raise ValueError(f"p-values must lie between 0 and 1, but are {list(pvalues)}.")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]


def _bootstrap(
    scores: NDArray[np.float64], confidence: float, resamples: int, seed: int
) -> tuple[float, float, float, NDArray[np.float64]]:
    """Return mean, percentile interval and resampled means ``[resamples]`` of ``scores [n]`` or ``[draws, n]``."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, but is {confidence}.")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, but is {resamples}.")
    if scores.ndim == 2:
        means = _two_level(scores, resamples, np.random.default_rng(seed))
        low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(scores.mean()), float(low), float(high), means
    result = bootstrap(
        (scores,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _CHUNK // scores.size),
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return float(scores.mean()), float(interval.low), float(interval.high), result.bootstrap_distribution


def _two_level(scores: NDArray[np.float64], resamples: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Return the means ``[resamples]`` of ``scores [draws, n]`` after resampling draws and units independently."""
    means, step = np.empty(resamples), max(1, _CHUNK // scores.shape[1])
    for begin in range(0, resamples, step):
        part = means[begin : begin + step]  # how often each draw and each unit was taken
        draws, units = (random.multinomial(n, np.full(n, 1 / n), size=part.size) / n for n in scores.shape)
        part[:] = ((draws @ scores) * units).sum(1)
    return means


def _differences(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Return ``a - b``, ``[n]`` or ``[draws, n]``, after checking that both hold finite scores of as many units."""
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.ndim == second.ndim == 2 and len(first) != len(second) and 1 not in (len(first), len(second)):
        first, second = first.mean(0), second.mean(0)  # draws that have no partners
    if first.shape[-1:] != second.shape[-1:]:
        raise ValueError(
            f"Paired scores must cover the same units, but the shapes are {first.shape} and {second.shape}."
        )
    return _scores(first - second)


def _scores(a: ArrayLike) -> NDArray[np.float64]:
    """Check ``a [n]`` or ``[draws, n]`` and return it, or its mean over draws where these are too few."""
    scores = np.asarray(a, dtype=float)
    if scores.ndim not in (1, 2):
        raise ValueError(f"Scores must be of shape [n] or [draws, n], but the shape is {scores.shape}.")
    if scores.shape[-1] < 2:
        raise ValueError(f"An interval needs at least 2 units, but there is {scores.shape[-1]}.")
    if not (finite := np.isfinite(scores)).all():
        first_bad = int(np.argmin(finite))
        raise ValueError(
            f"Scores must be finite, but {scores.size - int(finite.sum())} of {scores.size} are not,"
            f" the first at unit {first_bad % scores.shape[-1]} ({scores.flat[first_bad]})."
        )
    return scores.mean(0) if scores.ndim == 2 and len(scores) < MIN_DRAWS else scores
