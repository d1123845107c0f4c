"""A small multi-layer perceptron for each head, as in NL-ITI."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lightning_peft.editing.examples import check_examples
from lightning_peft.editing.probes.linear import Probes
from lightning_peft.editing.probes.logistic import centred
from lightning_peft.editing.probes.threads import each

_BLOCK = 8  # heads at a time


class MLPProbes(Probes):
    """One hidden layer, `w₂·relu(W₁ z + b₁) + b₂` on standardised features, for each head.

    What no hyperplane separates, it may (Hoscilowicz et al. 2024, NL-ITI, arXiv:2403.18680). Heads can be ranked by it;
    a direction it has not.

    Args:
        hidden: width of the hidden layer.
        epochs: steps of Adam, each over all examples.
        lr: its learning rate.
        weight_decay: of Adam with decoupled weight decay.
        seed: of the beginnings.

    Attributes:
        weights_: the four tensors of all heads, `[G, d, hidden]`, `[G, 1, hidden]`, `[G, hidden, 1]`, `[G, 1, 1]`.

    Example:
        >>> x = torch.randn(200, 1, 2, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, 0].prod(-1) > 0).long()  # which quadrant: no line can say
        >>> float(MLPProbes(weight_decay=0.0).fit(x, y).score(x, y)[0]) > 0.95
        True
    """

    def __init__(
        self, hidden: int = 32, epochs: int = 200, lr: float = 0.01, weight_decay: float = 0.1, seed: int = 0
    ) -> None:
        if hidden < 1 or epochs < 1:
            raise ValueError(f"hidden and epochs must be at least 1, got {hidden} and {epochs}.")
        self.hidden = hidden
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.seed = seed

    def fit(self, x: Tensor, y: Tensor) -> MLPProbes:
        """Fit every group to features `x [N, G, d]` and labels `y [N]`."""
        check_examples(x, y)
        groups, width = x.shape[1:]
        generator = torch.Generator().manual_seed(self.seed)
        begin = [
            torch.randn(groups, width, self.hidden, generator=generator) * math.sqrt(2 / width),
            torch.zeros(groups, 1, self.hidden),
            torch.randn(groups, self.hidden, 1, generator=generator) / math.sqrt(self.hidden),
            torch.zeros(groups, 1, 1),
        ]
        blocks = [slice(i, i + _BLOCK) for i in range(0, groups, _BLOCK)]
        fitted = each(
            lambda b: self._fit_block(x[:, b], y.to(x.device), [w[b].to(x.device) for w in begin]), blocks, x.device
        )
        self.weights_ = tuple(torch.cat(parts) for parts in zip(*(weights for weights, _, _ in fitted), strict=True))
        self.mean_ = torch.cat([mean for _, mean, _ in fitted])
        self.scale_ = torch.cat([scale for _, _, scale in fitted])
        return self

    def decision_function(self, x: Tensor) -> Tensor:
        """The log-odds of class 1, `[N, G]`."""
        z = ((x.double() - self.mean_) / self.scale_).float().transpose(0, 1)
        return _logits(z, self.weights_).mT.double()

    def _fit_block(self, x: Tensor, y: Tensor, begin: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        z, mean, scale = centred(x, torch.float32, standardize=True)
        sign = 2.0 * y - 1.0
        weights = [w.clone().requires_grad_() for w in begin]
        optimizer = torch.optim.AdamW(weights, lr=self.lr, weight_decay=self.weight_decay)
        with torch.enable_grad():
            for _ in range(self.epochs):
                # the heads share nothing, so the gradient of the sum is each head's own
                loss = softplus(-sign * _logits(z, weights)).mean(1).sum()
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    weight.grad = gradient
                optimizer.step()
        return [w.detach() for w in weights], mean, scale.double()


def _logits(z: Tensor, weights: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """`[G, N]` from `z [G, N, d]`."""
    first, bias, second, offset = weights
    return (torch.relu(z @ first + bias) @ second + offset)[..., 0]
