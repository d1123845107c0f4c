"""Hard-concrete gates: random values in [0, 1] that are exactly 0 or 1 with a probability that can be trained.

Louizos et al. 2018, arXiv:1712.01312; with these limits and this temperature Guo et al. 2021, arXiv:2012.07463.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOWER, UPPER, TEMPERATURE = -1.5, 1.5, 1.0
NOISE = 1e-4  # uniform noise keeps this distance from 0 and 1


def sampled(
    logits: Tensor, noise: Tensor, lower: float = LOWER, upper: float = UPPER, temperature: float = TEMPERATURE
) -> Tensor:
    """Return gates for uniform noise in (0, 1), of the logits' shape.

    Example:
        >>> sampled(torch.tensor([0.0, 0.0]), torch.tensor([0.5, 0.9])).tolist()
        [0.0, 1.0]
    """
    return _stretched(torch.sigmoid((torch.logit(noise) + logits) / temperature), lower, upper)


def settled(logits: Tensor, lower: float = LOWER, upper: float = UPPER) -> Tensor:
    """Return the gates of evaluation, which no noise moves."""
    return _stretched(torch.sigmoid(logits), lower, upper)


def open_probability(
    logits: Tensor, lower: float = LOWER, upper: float = UPPER, temperature: float = TEMPERATURE
) -> Tensor:
    """Return the probability that a sampled gate is not 0: `sigmoid(logits - temperature * log(-lower / upper))`."""
    return torch.sigmoid(logits - temperature * math.log(-lower / upper))


def _stretched(share: Tensor, lower: float, upper: float) -> Tensor:
    return (share * (upper - lower) + lower).clamp(0.0, 1.0)
