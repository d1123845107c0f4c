"""Accuracy and AUROC of many heads at once, with intervals that know that statements come in questions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def auroc(scores: Tensor, y: Tensor) -> Tensor:
    """Area under the ROC curve of each column: the chance that an example of class 1 scores above one of class 0.

    Args:
        scores: `[N, G]`.
        y: `[N]`, 0 or 1.

    Returns:
        `[G]` float64; equal scores count one half.

    Example:
        >>> auroc(torch.tensor([[0.1], [0.4], [0.35], [0.8]]), torch.tensor([0, 0, 1, 1]))
        tensor([0.7500], dtype=torch.float64)
    """
    return placements(scores, y)[0][y == 1].mean(0)


def placements(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For each example, the share of the other class that it beats, `[N, G]` float64, twice.

    Returns:
        The share of class 0 below an example, and the share of class 1 above it (ties one half each); the first
        matters for examples of class 1, the second for those of class 0. (DeLong, DeLong and Clarke-Pearson 1988.)
    """
    columns = scores.double().T.contiguous()
    shares = []
    for label in (0, 1):
        other = columns[:, y == label].sort(dim=1).values
        below = torch.searchsorted(other, columns) + torch.searchsorted(other, columns, right=True)
        shares.append(below.double().T / (2 * other.shape[1]))
    return shares[0], 1 - shares[1]


def accuracy_influence(correct: Tensor) -> Tensor:
    """What each row adds to the accuracy's error: `[N, G]` from `correct [N, G]`, summing to 0."""
    correct = correct.double()
    return (correct - correct.mean(0)) / len(correct)


def auroc_influence(scores: Tensor, y: Tensor) -> Tensor:
    """What each row adds to the AUROC's error, `[N, G]`, summing to 0; see `clustered_error`."""
    above, below = placements(scores, y)
    area = above[y == 1].mean(0)
    positives, negatives = int((y == 1).sum()), int((y == 0).sum())
    return torch.where(y[:, None] == 1, (above - area) / positives, (below - area) / negatives)


def clustered_error(influence: Tensor, groups: Tensor) -> Tensor:
    """Standard error `[G]` of an estimate whose rows come in clusters: statements of one question are not independent.

    The rows' influences are summed within clusters, and the spread of the sums is what counts (for the AUROC this is
    Obuchowski 1997, Biometrics 53:567).

    Args:
        influence: `[N, G]`.
        groups: `[N]` cluster of each row.
    """
    clusters, index = groups.unique(return_inverse=True)
    sums = influence.new_zeros(len(clusters), influence.shape[1]).index_add(0, index, influence)
    count = len(clusters)
    return (sums.square().sum(0) * (count / max(count - 1, 1))).sqrt()


def wilson(estimate: Tensor, error: Tensor, clusters: int, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """An interval for a share, that stays within 0 and 1.

    Wilson's interval (1927) with the number of independent examples that would give the same standard error; where
    that error is 0 (all right, or all wrong) the number of clusters takes its place.

    Args:
        estimate: shares.
        error: their standard errors.
        clusters: how many independent clusters there are.
        confidence: between 0 and 1.

    Returns:
        The lower and the upper ends.

    Example:
        >>> low, high = wilson(torch.tensor([0.5]), torch.tensor([0.05]), 100)
        >>> round(float(low), 3), round(float(high), 3)
        (0.404, 0.596)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}.")
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(confidence, dtype=torch.float64)))
    spread = estimate * (1 - estimate)
    n = torch.where((error > 0) & (spread > 0), spread / error.square().clamp(min=1e-300), float(clusters))
    centre = (estimate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (spread / n + z * z / (4 * n * n)).sqrt()
    return (centre - half).clamp(min=0), (centre + half).clamp(max=1)
