"""Logistic probes for many heads, fitted together to the optimum."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lightning_peft.editing.probes.linear import LinearProbes, check_examples
from lightning_peft.editing.probes.newton import Solution, minimise
from lightning_peft.editing.probes.threads import each

_CACHE_BYTES = 2 * 2**20  # features a CPU thread works on at a time, so that they stay in its cache
_DEVICE_BYTES = 512 * 2**20  # and an accelerator


class LogisticProbes(LinearProbes):
    """One L2-regularised logistic regression per group (head), all solved by a batched Newton iteration.

    Minimises, for each group, `C * sum_i log(1 + exp(-s_i (w·z_i + b))) + |w|² / 2` with `s_i = ±1` and a free
    intercept, which is scikit-learn's `LogisticRegression` objective, on features `z` that are standardised if asked.

    Args:
        C: inverse strength of the penalty.
        standardize: give every feature mean 0 and variance 1 first, as `StandardScaler` does.
        max_iter: Newton iterations at most.
        tol: stop when no group's largest gradient entry, divided by the number of samples and C, exceeds this;
            default 1e-12 in float64 and 1e-6 in float32.
        dtype: the precision of the optimum, `torch.float64` (single precision first, then refined) or
            `torch.float32`, which takes half the time.

    Attributes:
        coef_: `[G, d]`, in the space of the raw features.
        intercept_: `[G]`.
        n_iter_: iterations used, by the group that needed most.
        converged_: whether the gradients came down to `tol`.

    Example:
        >>> x = torch.tensor([[[-2.0]], [[-1.0]], [[1.0]], [[2.0]]])  # 4 samples, 1 group, 1 feature
        >>> probes = LogisticProbes().fit(x, torch.tensor([0, 0, 1, 1]))
        >>> probes.score(x, torch.tensor([0, 0, 1, 1]))
        tensor([1.])
    """

    def __init__(
        self,
        C: float = 1.0,
        standardize: bool = True,
        max_iter: int = 100,
        tol: float | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if C <= 0:
            raise ValueError(f"C must be positive, got {C}.")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}.")
        self.C = C
        self.standardize = standardize
        self.max_iter = max_iter
        self.tol = tol
        self.dtype = dtype

    def fit(self, x: Tensor, y: Tensor) -> LogisticProbes:
        """Fit every group.

        Args:
            x: `[N, G, d]` features.
            y: `[N]` labels, 0 or 1.

        Raises:
            ValueError: labels of one class only or other than 0 and 1, or features that are not finite.
        """
        check_examples(x, y)
        n, groups, width = x.shape
        sign = (2.0 * y - 1.0).to(x.device, self.dtype)
        available = _CACHE_BYTES if x.device.type == "cpu" else _DEVICE_BYTES
        step = max(1, available // (4 * n * width))
        blocks = [x[:, begin : begin + step] for begin in range(0, groups, step)]
        fitted = each(lambda block: self._fit_block(block, sign), blocks, x.device)
        self.coef_ = torch.cat([coef for coef, _, _ in fitted])
        self.intercept_ = torch.cat([intercept for _, intercept, _ in fitted])
        self.n_iter_ = max(solution.iterations for _, _, solution in fitted)
        self.converged_ = all(solution.converged for _, _, solution in fitted)
        return self

    def log_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean negative log-likelihood of every group, `[G]`."""
        sign = (2.0 * y - 1.0).double()
        return softplus(-sign[:, None] * self.decision_function(x)).mean(0)

    def _fit_block(self, x: Tensor, sign: Tensor) -> tuple[Tensor, Tensor, Solution]:
        z, mean, scale = centred(x, self.dtype, self.standardize)
        solution = Solution(z.new_zeros(z.shape[0], z.shape[2]), z.new_zeros(len(z)))
        double = self.dtype == torch.float64
        rough = 1e-6 if double or self.tol is None else self.tol
        fine = 1e-12 if self.tol is None else self.tol
        solution = minimise(z.float(), sign.float(), self.C, solution, rough, self.max_iter)
        if double:
            solution = minimise(z, sign, self.C, solution, fine, self.max_iter)
        coef = solution.w.double() / scale.double()
        return coef, solution.b.double() - (coef * mean).sum(-1), solution


def centred(x: Tensor, dtype: torch.dtype, standardize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return features as a solver needs them: `[G, N, d]`, contiguous, of mean 0, with `standardize` of variance 1.

    Args:
        x: `[N, G, d]`.
        dtype: of the result.
        standardize: whether to divide by the standard deviation too; a constant feature becomes 0 then.

    Returns:
        The features, the mean that was taken off and the scale that was divided by, `[G, d]` both.
    """
    n, groups, width = x.shape
    z = torch.empty(groups, n, width, dtype=dtype, device=x.device).copy_(x.transpose(0, 1))
    # a head that looks at one place only may vary by a hundred-thousandth of its mean: the first row goes off first,
    # which is exact, and leaves a constant feature exactly 0
    first = z[:, :1].clone()
    z -= first
    average = z.new_full((1, 1, n), 1 / n).expand(groups, 1, n)
    rest = torch.bmm(average, z)
    z -= rest
    mean = first.double() + rest.double()
    scale = torch.ones_like(rest)
    if standardize:
        scale = torch.bmm(average, z.square()).sqrt()  # four times as fast as torch's norm along this axis
        scale = scale.masked_fill(scale == 0, 1)
        z /= scale
    return z, mean[:, 0], scale[:, 0]
