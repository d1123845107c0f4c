"""What all probes can do once they are fitted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from lightning_peft.editing.probes.scores import auroc

_GROUPS = 32  # so many are widened to float64 at a time


class Probes(ABC):
    """One binary classifier per group (head) of features; all are fitted and asked together.

    Features are `x [N, G, d]`: N examples, G groups, d features each. Labels are `y [N]`, 0 or 1, the same for all
    groups. Subclasses set their parameters in `__init__` and never change them; what is fitted ends in `_`.
    """

    @abstractmethod
    def fit(self, x: Tensor, y: Tensor) -> Self:
        """Fit every group."""

    @abstractmethod
    def decision_function(self, x: Tensor) -> Tensor:
        """A number for each example and group, `[N, G]`, above 0 where class 1 is the likelier."""

    def predict_proba(self, x: Tensor) -> Tensor:
        """The probability of class 1, `[N, G]`."""
        return self.decision_function(x).sigmoid()

    def predict(self, x: Tensor) -> Tensor:
        """The likelier class, `[N, G]` of 0 and 1."""
        return (self.decision_function(x) > 0).long()

    def score(self, x: Tensor, y: Tensor) -> Tensor:
        """Accuracy of every group, `[G]`."""
        return (self.predict(x) == y[:, None]).float().mean(0)

    def auroc(self, x: Tensor, y: Tensor) -> Tensor:
        """Area under the ROC curve of every group, `[G]`, in float64; ties count one half."""
        return auroc(self.decision_function(x), y)

    def log_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean negative log-likelihood of every group, `[G]`."""
        chosen = torch.where(y[:, None] == 1, self.predict_proba(x), 1 - self.predict_proba(x))
        return -chosen.clamp(min=torch.finfo(chosen.dtype).tiny).log().mean(0)


class LinearProbes(Probes):
    """Probes that say `w·x + b`.

    Attributes:
        coef_: `[G, d]` float64, in the space of the raw features.
        intercept_: `[G]` float64.
    """

    coef_: Tensor
    intercept_: Tensor

    def decision_function(self, x: Tensor) -> Tensor:
        """The log-odds of class 1, `[N, G]`, for features `x [N, G, d]`."""
        parts = []
        for begin in range(0, x.shape[1], _GROUPS):
            chosen = slice(begin, begin + _GROUPS)
            z = x[:, chosen].double().permute(1, 2, 0)  # [g, d, N]
            parts.append(torch.bmm(self.coef_[chosen, None], z)[:, 0])
        return torch.cat(parts).mT + self.intercept_
