"""Contrast-consistent search: a probe without labels, from pairs of opposite statements."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from lightning_peft.editing.probes.linear import LinearProbes, check_examples
from lightning_peft.editing.probes.threads import each

_BLOCK = 16  # heads at a time


class CCSProbes(LinearProbes):
    """Contrast-consistent search (Burns et al. 2023, arXiv:2212.03827), every head and every restart at once.

    Minimises over the pairs `(p(a) + p(b) - 1)² + min(p(a), p(b))²`: of two statements that cannot both be true, one
    is, and the probe is sure which. Each side of the pairs is centred by itself first, so that what tells the sides
    apart is not found again. Nothing in this says which class is the true one: `fit` chooses the sign that agrees with
    the labels where there are any, for each head.

    Args:
        restarts: random beginnings for each head; the one of smallest loss is kept.
        max_iter: steps of Adam, each over all pairs.
        lr: its learning rate, for features of variance 1.
        weight_decay: of Adam with decoupled weight decay.
        seed: of the beginnings.

    Attributes:
        loss_: `[G]`, the smallest loss of each head.

    Example:
        >>> x = torch.randn(40, 1, 3, generator=torch.Generator().manual_seed(0))
        >>> x[1::2, 0, 1] += 8  # the second of each pair is the true one, but for the first ten pairs
        >>> x[:20, 0, 1] = x[:20, 0, 1].reshape(10, 2).flip(1).flatten()
        >>> y = torch.arange(40) % 2
        >>> y[:20] = 1 - y[:20]
        >>> float(CCSProbes().fit(x, y, pairs=torch.arange(40).reshape(20, 2)).score(x, y)[0]) > 0.9
        True
    """

    def __init__(
        self, restarts: int = 10, max_iter: int = 500, lr: float = 0.03, weight_decay: float = 0.01, seed: int = 0
    ) -> None:
        if restarts < 1 or max_iter < 1:
            raise ValueError(f"restarts and max_iter must be at least 1, got {restarts} and {max_iter}.")
        self.restarts = restarts
        self.max_iter = max_iter
        self.lr = lr
        self.weight_decay = weight_decay
        self.seed = seed

    def fit(self, x: Tensor, y: Tensor | None = None, pairs: Tensor | None = None) -> Self:
        """Fit every group.

        Args:
            x: `[N, G, d]` features.
            y: `[N]`, 0 or 1: only for the sign of each probe; without labels it is arbitrary.
            pairs: `[P, 2]` rows of `x`, two statements of which one at most is true.

        Raises:
            ValueError: no pairs, or pairs outside the rows; otherwise as all probes.
        """
        check_examples(x, y)
        if pairs is None or pairs.dim() != 2 or pairs.shape[1] != 2 or len(pairs) < 2:
            raise ValueError("CCS needs pairs [P, 2], at least two, of rows that cannot both be true.")
        if not 0 <= int(pairs.min()) <= int(pairs.max()) < len(x):
            raise ValueError(f"Pairs name rows 0 to {len(x) - 1}, but these go to {int(pairs.max())}.")
        generator = torch.Generator().manual_seed(self.seed)
        groups, width = x.shape[1:]
        begin = torch.randn(groups, width, self.restarts, generator=generator) / math.sqrt(width)
        blocks = [slice(i, i + _BLOCK) for i in range(0, groups, _BLOCK)]
        fitted = each(lambda b: self._fit_block(x[:, b], pairs, begin[b].to(x.device)), blocks, x.device)
        self.coef_, self.intercept_, self.loss_ = (torch.cat(parts) for parts in zip(*fitted, strict=True))
        if y is not None:
            wrong = self.auroc(x, y) < 0.5
            self.coef_[wrong], self.intercept_[wrong] = -self.coef_[wrong], -self.intercept_[wrong]
        return self

    def _fit_block(self, x: Tensor, pairs: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sides = x[pairs].double()  # [P, 2, g, d]
        centre = sides.mean(0)
        scale = (sides - centre).square().mean((0, 1)).sqrt()
        scale = scale.masked_fill(scale == 0, 1)
        a, b = ((sides - centre) / scale).float().permute(1, 2, 0, 3).contiguous()  # [g, P, d] each
        count = a.shape[1]
        offset = w.new_zeros(len(w), 1, self.restarts)
        w = w.clone()  # the caller's beginnings stay as they are
        optimizer = torch.optim.AdamW([w, offset], lr=self.lr, weight_decay=self.weight_decay)
        loss = w.new_zeros(len(w), self.restarts)
        for _ in range(self.max_iter):
            p, q = torch.sigmoid(a @ w + offset), torch.sigmoid(b @ w + offset)  # [g, P, restarts]
            both, sure = p + q - 1, torch.minimum(p, q)
            loss = (both.square() + sure.square()).mean(1)
            down_p = 2 * (both + sure * (p <= q)) * p * (1 - p) / count
            down_q = 2 * (both + sure * (q < p)) * q * (1 - q) / count
            w.grad, offset.grad = a.mT @ down_p + b.mT @ down_q, (down_p + down_q).sum(1, keepdim=True)
            optimizer.step()
        best = loss.argmin(1)
        rows = torch.arange(len(w), device=w.device)
        coef = w[rows, :, best].double() / scale
        # a statement may stand on either side, so what is taken off is the mean of both
        return coef, offset[rows, 0, best].double() - (coef * centre.mean(0)).sum(-1), loss[rows, best].double()
