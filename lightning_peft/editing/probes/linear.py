"""Linear probes of many heads: what they can do once they are fitted, and what none can be fitted to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

_GROUPS = 32  # so many are widened to float64 at a time


class LinearProbes(ABC):
    """One binary classifier `w·x + b` per group (head) of features; all are fitted together.

    Features are `x [N, G, d]`: N examples, G groups, d features each. Labels are `y [N]`, 0 or 1, the same for all
    groups. Subclasses set their parameters in `__init__` and never change them; what is fitted ends in `_`.

    Attributes:
        coef_: `[G, d]` float64, in the space of the raw features.
        intercept_: `[G]` float64.
    """

    coef_: Tensor
    intercept_: Tensor

    @abstractmethod
    def fit(self, x: Tensor, y: Tensor) -> Self:
        """Fit every group."""

    def decision_function(self, x: Tensor) -> Tensor:
        """Return the log-odds of class 1, `[N, G]`, for features `x [N, G, d]`."""
        parts = []
        for begin in range(0, x.shape[1], _GROUPS):
            chosen = slice(begin, begin + _GROUPS)
            z = x[:, chosen].double().permute(1, 2, 0)  # [g, d, N]
            parts.append(torch.bmm(self.coef_[chosen, None], z)[:, 0])
        return torch.cat(parts).mT + self.intercept_

    def predict_proba(self, x: Tensor) -> Tensor:
        """Return the probability of class 1, `[N, G]`."""
        return self.decision_function(x).sigmoid()

    def predict(self, x: Tensor) -> Tensor:
        """Return the likelier class, `[N, G]` of 0 and 1."""
        return (self.decision_function(x) > 0).long()

    def score(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the accuracy of every group, `[G]`."""
        return (self.predict(x) == y[:, None]).float().mean(0)

    def auroc(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the area under the ROC curve of every group, `[G]`, in float64; ties count one half."""
        return auroc(self.decision_function(x), y)


def auroc(scores: Tensor, y: Tensor) -> Tensor:
    """Return the area under the ROC curve of each column: the chance that class 1 scores above class 0.

    Args:
        scores: `[N, G]`.
        y: `[N]`, 0 or 1.

    Returns:
        `[G]` float64; equal scores count one half.

    Example:
        >>> auroc(torch.tensor([[0.1], [0.4], [0.35], [0.8]]), torch.tensor([0, 0, 1, 1]))
        tensor([0.7500], dtype=torch.float64)
    """
    columns = scores.double().T.contiguous()
    false = columns[:, y == 0].sort(dim=1).values
    below = torch.searchsorted(false, columns) + torch.searchsorted(false, columns, right=True)
    return (below.double().T / (2 * false.shape[1]))[y == 1].mean(0)


def check_examples(x: Tensor, y: Tensor | None = None) -> None:
    """Refuse what no probe can be fitted to.

    Raises:
        ValueError: features that are not `[N, G, d]` or not finite; labels that are not one a row, of one class only,
            or other than 0 and 1.
    """
    if x.dim() != 3:
        raise ValueError(f"Probes take features [N, groups, features], but these have shape {tuple(x.shape)}.")
    if y is not None and y.shape != x.shape[:1]:
        raise ValueError(f"{len(x)} examples need {len(x)} labels, but the labels have shape {tuple(y.shape)}.")
    if y is not None and (labels := set(y.unique().tolist())) != {0, 1}:
        listed = ", ".join(str(v) for v in sorted(labels))
        raise ValueError(f"A probe needs examples of both classes, 0 and 1; the labels given are: {listed}.")
    if not torch.isfinite(x.sum()):  # a sum is finite only where all are, or nearly all are huge
        finite = torch.isfinite(x).all(-1).all(0)
        if not finite.all():
            group = int((~finite).nonzero()[0])
            raise ValueError(f"The activations of probe {group} contain NaN or infinite values.")
