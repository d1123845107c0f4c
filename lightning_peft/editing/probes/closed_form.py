"""Probes in closed form: they need the classes' means and covariances, and no iteration."""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor

from lightning_peft.editing.examples import check_examples
from lightning_peft.editing.moments import Moments
from lightning_peft.editing.probes.linear import LinearProbes


class MomentProbes(LinearProbes):
    """Probes that follow from `Moments`, so that they can be fitted to a stream, and to any split of it."""

    def fit(self, x: Tensor, y: Tensor) -> Self:
        """Fit every group to features `x [N, G, d]` and labels `y [N]`."""
        check_examples(x, y)
        return self.fit_moments(Moments.of(x, y))

    def fit_moments(self, moments: Moments) -> Self:
        """Fit every group to the moments of its examples: the same probes as `fit` of those examples."""
        moments.check()
        self.coef_, self.intercept_ = self._solve(moments)
        return self

    @abstractmethod
    def _solve(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """`coef_ [G, d]` and `intercept_ [G]`."""


class MassMeanProbes(MomentProbes):
    """The direction from the mean of class 0 to that of class 1 (Li et al. 2023; Marks and Tegmark 2023).

    Along it each class is taken to be normal, with one variance for both, which sets the scale and the threshold, so
    that `predict_proba` is a probability. With the covariance corrected for (Marks and Tegmark 2023,
    arXiv:2310.06824, section 5) the probe is `LDAProbes`.

    Example:
        >>> x = torch.tensor([[[-2.0, 1.0]], [[-1.0, -1.0]], [[1.0, 1.0]], [[2.0, -1.0]]])
        >>> MassMeanProbes().fit(x, torch.tensor([0, 0, 1, 1])).coef_
        tensor([[12.,  0.]], dtype=torch.float64)
    """

    def _solve(self, moments: Moments) -> tuple[Tensor, Tensor]:
        return _calibrated(moments.mean[1] - moments.mean[0], moments)


class LDAProbes(MomentProbes):
    """Linear discriminant analysis: the mass mean in the space where the classes' common covariance is a sphere.

    The objective and the numbers are those of scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr")`.

    Args:
        shrinkage: from 0 to 1, how far the covariance is drawn towards a multiple of the identity.

    Example:
        >>> x = torch.tensor([[[-2.0]], [[-1.0]], [[1.0]], [[2.0]]])
        >>> LDAProbes().fit(x, torch.tensor([0, 0, 1, 1])).predict(x).flatten()
        tensor([0, 0, 1, 1])
    """

    def __init__(self, shrinkage: float = 0.0) -> None:
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage must be between 0 and 1, got {shrinkage}.")
        self.shrinkage = shrinkage

    def _solve(self, moments: Moments) -> tuple[Tensor, Tensor]:
        covariance = moments.within
        size = covariance.diagonal(dim1=1, dim2=2).mean(-1)
        identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        covariance = (1 - self.shrinkage) * covariance + (self.shrinkage * size)[:, None, None] * identity
        shift = moments.mean[1] - moments.mean[0]
        # the pseudo-inverse: a feature that never varies has nothing to say
        coef = (torch.linalg.pinv(covariance, hermitian=True) @ shift[..., None])[..., 0]
        centre = (moments.mean[1] + moments.mean[0]) / 2
        return coef, _prior(moments) - (coef * centre).sum(-1)


class RidgeProbes(MomentProbes):
    """Least squares on labels -1 and 1 with an L2 penalty, as scikit-learn's `RidgeClassifier` on standardised data.

    Args:
        alpha: the penalty's weight: minimises `sum_i (s_i - w·z_i - b)² + alpha |w|²`.
        standardize: give every feature mean 0 and variance 1 first.

    Attributes:
        slope_: `[G]`, what the decision is multiplied with to be a log-odds, from the classes' normal distributions
            along it.

    Example:
        >>> x = torch.tensor([[[-2.0]], [[-1.0]], [[1.0]], [[2.0]]])
        >>> RidgeProbes(alpha=0.0).fit(x, torch.tensor([0, 0, 1, 1])).coef_
        tensor([[0.6000]], dtype=torch.float64)
    """

    slope_: Tensor

    def __init__(self, alpha: float = 1.0, standardize: bool = True) -> None:
        if alpha < 0:
            raise ValueError(f"alpha must be at least 0, got {alpha}.")
        self.alpha = alpha
        self.standardize = standardize

    def predict_proba(self, x: Tensor) -> Tensor:
        """The probability of class 1, `[N, G]`: one half where the decision is 0."""
        return (self.slope_ * self.decision_function(x)).sigmoid()

    def _solve(self, moments: Moments) -> tuple[Tensor, Tensor]:
        n, share = moments.count.sum(), moments.count[1] / moments.count.sum()
        covariance, centre = moments.overall, moments.overall_mean
        # with labels -1 and 1 the covariance of features and label is 2 p (1 - p) times the difference of the means
        pull = 2 * share * (1 - share) * (moments.mean[1] - moments.mean[0])
        scale = covariance.diagonal(dim1=1, dim2=2).sqrt() if self.standardize else torch.ones_like(centre)
        scale = scale.masked_fill(scale == 0, 1)
        normal = n * covariance / (scale[..., :, None] * scale[..., None, :])
        normal.diagonal(dim1=1, dim2=2).add_(self.alpha)
        coef = (torch.linalg.pinv(normal, hermitian=True) @ (n * pull / scale)[..., None])[..., 0] / scale
        calibrated, _ = _calibrated(coef, moments)
        self.slope_ = (calibrated * coef).sum(-1) / coef.square().sum(-1).clamp(min=1e-300)
        return coef, 2 * share - 1 - (coef * centre).sum(-1)


def _calibrated(direction: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """The log-odds of class 1 along `direction [G, d]`, if both classes are normal with one variance there."""
    low, high = ((direction * mean).sum(-1) for mean in moments.mean)
    variance = torch.einsum("gd,gde,ge->g", direction, moments.within, direction)
    # classes that do not vary along it at all are told apart for certain; a finite slope keeps arithmetic going
    floor = torch.finfo(variance.dtype).eps * (high - low).square()
    slope = (high - low) / torch.maximum(variance, floor).clamp(min=1e-300)
    return slope[:, None] * direction, _prior(moments) - slope * (high + low) / 2


def _prior(moments: Moments) -> Tensor:
    return (moments.count[1] / moments.count[0]).log()
