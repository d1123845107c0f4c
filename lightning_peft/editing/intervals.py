"""Intervals of shares: of few examples, and of examples that come in clusters."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

_Z = NormalDist().inv_cdf(0.975)


def wilson(share: float, n: float) -> tuple[float, float]:
    """Return the ends of Wilson's score interval at 95% (*J. Am. Stat. Assoc.* 22:209, 1927).

    It stays within 0 and 1, and holds for few examples and near 0 and 1.

    Args:
        share: the share, or the mean of shares, from 0 to 1.
        n: the number of independent examples it is of, above 0; need not be whole.

    Example:
        >>> low, high = wilson(0.9, 10)
        >>> round(low, 3), round(high, 3)
        (0.596, 0.982)
    """
    centre, spread = share + _Z**2 / (2 * n), _Z * math.sqrt(share * (1 - share) / n + (_Z / (2 * n)) ** 2)
    low, high = ((centre + sign * spread) / (1 + _Z**2 / n) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def clustered_wilson(right: Tensor, clusters: Tensor) -> tuple[float, float]:
    """Return `wilson` of examples that come in clusters, of which those of one cluster are not independent.

    Its n is the number of independent examples that would give the same standard error, which is of the sums within
    clusters; where that error is 0 (all right, or all wrong) the number of clusters.

    Args:
        right: `[N]`, 0 or 1.
        clusters: `[N]`, the cluster of each example.

    Example:
        >>> low, high = clustered_wilson(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 1, 0, 1]))
        >>> round(low, 3), round(high, 3)  # both clusters are half right: as of two examples
        (0.095, 0.905)
    """
    share = float(right.double().mean())
    names, index = clusters.unique(return_inverse=True)
    n = len(names)
    sums = torch.zeros(n, dtype=torch.float64, device=right.device)
    sums.index_add_(0, index, (right.double() - share) / len(right))
    variance = float(sums.square().sum()) * n / max(n - 1, 1)
    spread = share * (1 - share)
    return wilson(share, spread / variance if variance > 0 and spread > 0 else n)
