"""Linear probes for many heads, fitted together to the optimum."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_BYTES = 256 * 2**20  # features are widened to float64 a few groups at a time


class LogisticProbes:
    """One L2-regularised logistic regression per group (head), all solved by one batched Newton iteration.

    Minimises, for each group, `C * sum_i log(1 + exp(-s_i (w·z_i + b))) + |w|² / 2` with `s_i = ±1` and a free
    intercept, which is scikit-learn's `LogisticRegression` objective, on features `z` that are standardised if asked.
    Solved in float64 until the gradient vanishes; step halving keeps every iteration a descent.

    Args:
        C: inverse strength of the penalty.
        standardize: give every feature mean 0 and variance 1 first, as `StandardScaler` does.
        max_iter: Newton iterations at most.
        tol: stop when no group's largest gradient entry, divided by the number of samples and C, exceeds this.

    Attributes:
        coef_: `[G, d]`, in the space of the raw features.
        intercept_: `[G]`.
        n_iter_: iterations used.

    Example:
        >>> x = torch.tensor([[[-2.0]], [[-1.0]], [[1.0]], [[2.0]]])  # 4 samples, 1 group, 1 feature
        >>> probes = LogisticProbes().fit(x, torch.tensor([0, 0, 1, 1]))
        >>> probes.score(x, torch.tensor([0, 0, 1, 1]))
        tensor([1.])
    """

    def __init__(self, C: float = 1.0, standardize: bool = True, max_iter: int = 100, tol: float = 1e-10) -> None:
        if C <= 0:
            raise ValueError(f"C must be positive, got {C}.")
        self.C = C
        self.standardize = standardize
        self.max_iter = max_iter
        self.tol = tol

    def fit(self, x: Tensor, y: Tensor) -> LogisticProbes:
        """Fit every group.

        Args:
            x: `[N, G, d]` features.
            y: `[N]` labels, 0 or 1.

        Raises:
            ValueError: labels of one class only or other than 0 and 1, or features that are not finite.
        """
        labels = set(y.unique().tolist())
        if labels != {0, 1}:
            found = ", ".join(str(v) for v in sorted(labels))
            raise ValueError(f"A probe needs examples of both classes, 0 and 1; the labels given are: {found}.")
        if not torch.isfinite(x).all():
            group = int((~torch.isfinite(x)).any(-1).any(0).nonzero()[0])
            raise ValueError(f"The activations of probe {group} contain NaN or infinite values.")
        n, groups, width = x.shape
        sign = (2.0 * y - 1.0).double()
        step = max(1, _CHUNK_BYTES // (8 * n * (width + 1)))
        coefs, intercepts, iterations = [], [], 0
        for begin in range(0, groups, step):
            coef, intercept, used = self._fit_chunk(x[:, begin : begin + step], sign)
            coefs.append(coef)
            intercepts.append(intercept)
            iterations = max(iterations, used)
        self.coef_ = torch.cat(coefs)
        self.intercept_ = torch.cat(intercepts)
        self.n_iter_ = iterations
        return self

    def decision_function(self, x: Tensor) -> Tensor:
        """The log-odds of class 1, `[N, G]`, for features `x [N, G, d]`."""
        return torch.einsum("ngd,gd->ng", x.double(), self.coef_) + self.intercept_

    def predict_proba(self, x: Tensor) -> Tensor:
        """The probability of class 1, `[N, G]`."""
        return self.decision_function(x).sigmoid()

    def predict(self, x: Tensor) -> Tensor:
        """The likelier class, `[N, G]` of 0 and 1."""
        return (self.decision_function(x) > 0).long()

    def score(self, x: Tensor, y: Tensor) -> Tensor:
        """Accuracy of every group, `[G]`."""
        return (self.predict(x) == y[:, None]).float().mean(0)

    def log_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean negative log-likelihood of every group, `[G]`."""
        sign = (2.0 * y - 1.0).double()
        return torch.nn.functional.softplus(-sign[:, None] * self.decision_function(x)).mean(0)

    def _fit_chunk(self, x: Tensor, sign: Tensor) -> tuple[Tensor, Tensor, int]:
        z = x.double().transpose(0, 1)  # [G, N, d]
        mean, scale = torch.zeros_like(z[:, 0]), torch.ones_like(z[:, 0])
        if self.standardize:
            mean = z.mean(1)
            scale = z.std(1, unbiased=False)
            scale[scale == 0] = 1.0
        z = torch.cat([(z - mean[:, None]) / scale[:, None], torch.ones_like(z[..., :1])], dim=-1)
        weights, used = self._newton(z, sign)
        coef = weights[:, :-1] / scale
        return coef, weights[:, -1] - (coef * mean).sum(-1), used

    def _newton(self, z: Tensor, sign: Tensor) -> tuple[Tensor, int]:
        """Minimise for all groups at once; `z [G, N, d + 1]` ends in a column of ones, which is not penalised."""
        groups, n, width = z.shape
        penalty = torch.ones(width, dtype=z.dtype, device=z.device)
        penalty[-1] = 0.0

        def loss(w: Tensor) -> Tensor:
            margins = sign * torch.einsum("gnd,gd->gn", z, w)
            return self.C * torch.nn.functional.softplus(-margins).sum(-1) + 0.5 * (penalty * w * w).sum(-1)

        w = z.new_zeros(groups, width)
        value = loss(w)
        for iteration in range(1, self.max_iter + 1):
            margins = sign * torch.einsum("gnd,gd->gn", z, w)
            p = torch.sigmoid(-margins)
            gradient = -self.C * torch.einsum("gnd,gn->gd", z, sign * p) + penalty * w
            if float(gradient.abs().max()) <= self.tol * n * self.C:
                return w, iteration
            curvature = self.C * p * (1 - p)
            hessian = torch.einsum("gnd,gn,gne->gde", z, curvature, z) + torch.diag(penalty)
            # the intercept alone has no penalty: a whisper of one keeps separable data solvable
            hessian[:, -1, -1] += 1e-12
            step = torch.linalg.solve(hessian, gradient)
            size = z.new_ones(groups, 1)
            for _ in range(30):
                candidate = loss(w - size * step)
                worse = candidate > value + 1e-12 * value.abs()
                if not worse.any():
                    break
                size = torch.where(worse[:, None], size / 2, size)
            w = w - size * step
            value = loss(w)
        return w, self.max_iter
