"""Newton's method for many small logistic regressions side by side, arranged for how fast memory is.

A plain batched Newton iteration streams all heads' features through memory half a dozen times an iteration and spends
most of its time waiting. Here a few heads are taken at a time, so that their features stay in the cache from the first
iteration to the last; the Hessian, which costs as much as half a dozen gradients, is kept while it still takes the
gradient down quickly; the line search needs no pass over the features, because margins are linear in the step; and
double precision, where asked for, only refines what single precision has found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

_KEEP = 0.2  # a Hessian is kept while each step takes the gradient down to this share of the last one
_HALVINGS = 30


@dataclass
class Solution:
    """The state of the iteration.

    Args:
        w: `[g, d]`.
        b: `[g]`.
        factor: the last Cholesky factor `[g, d + 1, d + 1]`, or None.
        iterations: gradients computed.
        converged: whether every gradient is as small as was asked.
    """

    w: Tensor
    b: Tensor
    factor: Tensor | None = None
    iterations: int = 0
    converged: bool = False


def minimise(z: Tensor, sign: Tensor, C: float, start: Solution, tol: float, max_iter: int) -> Solution:
    """Minimise `C * sum_i log(1 + exp(-s_i (w·z_i + b))) + |w|² / 2` for each of g groups.

    Args:
        z: `[g, N, d]`, contiguous.
        sign: `[N]`, 1 or -1.
        C: the weight of the loss against the penalty.
        start: where to begin; it may be of another dtype.
        tol: what the largest entry of the gradient, divided by `N * C`, must come down to.
        max_iter: iterations at most.

    Returns:
        The minimum, or how far it got: until `max_iter`, or until this precision yields no further descent.
    """
    groups, n, _ = z.shape
    s = sign.expand(groups, n)
    w, b = start.w.to(z.dtype), start.b.to(z.dtype)
    factor = None if start.factor is None else start.factor.to(z.dtype)
    margin = (_times(z, w) + b[:, None]) * s
    room = torch.empty_like(z)  # for weighted features: memory that is asked for anew each time is slow to get
    value = _loss(margin, w, C)
    slack = 8 * torch.finfo(z.dtype).eps
    before, best = float("inf"), float("inf")
    for iteration in range(start.iterations + 1, max_iter + 1):
        wrong = torch.sigmoid(-margin)
        pull = s * wrong
        gradient = torch.cat([w - C * torch.bmm(pull[:, None], z)[:, 0], -C * pull.sum(-1, keepdim=True)], dim=1)
        size = float(gradient.abs().max()) / (n * C)
        if size <= tol:
            return Solution(w, b, factor, iteration, True)
        stalled = size > 0.9 * best
        best = min(best, size)
        fresh = factor is None or size > _KEEP * before
        if fresh:
            factor = _cholesky(z, wrong, C, room)
            if factor is None:
                return Solution(w, b, None, iteration)
        before = size
        assert factor is not None
        step = torch.cholesky_solve(gradient[..., None], factor)[..., 0]
        dw, db = step[:, :-1], step[:, -1]
        change = (_times(z, dw) + db[:, None]) * s
        length = z.new_ones(groups, 1)
        for _ in range(_HALVINGS):
            reached = _loss(margin - length * change, w - length * dw, C)
            uphill = ~(reached <= value + slack * (value.abs() + 1))
            if not uphill.any():
                break
            length = torch.where(uphill[:, None], length / 2, length)
        else:
            if fresh:
                return Solution(w, b, factor, iteration)
            factor = None  # an old Hessian led uphill: try the same place with its own
            continue
        if stalled and fresh and bool((value - reached <= slack * value.abs()).all()):
            return Solution(w, b, factor, iteration)
        w, b, margin, value = w - length * dw, b - length[:, 0] * db, margin - length * change, reached
    return Solution(w, b, factor, max_iter)


def _times(z: Tensor, w: Tensor) -> Tensor:
    """Return `z·w`, `[g, N]`, the vector on the left: MKL's batched product then takes an eighth of the time."""
    return torch.bmm(w[:, None], z.mT)[:, 0]


def _loss(margin: Tensor, w: Tensor, C: float) -> Tensor:
    return C * softplus(-margin).sum(-1) + 0.5 * w.square().sum(-1)


def _cholesky(z: Tensor, wrong: Tensor, C: float, room: Tensor) -> Tensor | None:
    """Return the factor of the Hessian; None where it is not positive definite in this precision."""
    groups, _, d = z.shape
    curvature = C * wrong * (1 - wrong)
    weighted = torch.mul(z, curvature[..., None], out=room)
    hessian = z.new_empty(groups, d + 1, d + 1)
    hessian[:, :d, :d] = torch.bmm(weighted.mT, z)
    hessian[:, d, :d] = hessian[:, :d, d] = weighted.sum(1)
    hessian[:, d, d] = curvature.sum(-1)
    hessian.diagonal(dim1=1, dim2=2)[:, :d] += 1
    # the intercept alone has no penalty: a whisper of one keeps separable data solvable
    hessian[:, d, d] += torch.finfo(z.dtype).eps
    factor, failed = torch.linalg.cholesky_ex(hessian)
    return None if failed.any() or not torch.isfinite(factor).all() else factor
