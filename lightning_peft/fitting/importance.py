"""How unimportant each block's adapter is, scored in training: the formulas of importance-aware sparse tuning.

Yao et al. 2024, arXiv:2410.11772. A score begins at 0; the larger it is, the less its block's adapter helps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TRIES = 1000  # sets that are drawn to find distinct ones


def draw(weights: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Return `count` distinct block numbers, drawn one after another in proportion to `weights [L]`, in order."""
    return sorted(torch.multinomial(weights, count, replacement=False, generator=generator).tolist())


def draw_trained(scores: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Return the blocks that a step trains: `count` of them, in proportion to `sigmoid(-I)`.

    Args:
        scores: I, `[L]`.
        count: how many.
        generator: of the draws.
    """
    return draw(torch.sigmoid(-scores), count, generator)


def draw_suppressed(scores: Tensor, count: int, sets: int, generator: torch.Generator) -> list[list[int]]:
    """Return distinct sets of blocks to suppress, `count` blocks each, in proportion to `sigmoid(I)`.

    Args:
        scores: I, `[L]`.
        count: blocks in each set.
        sets: how many sets at most; fewer where the scores leave fewer to be found.
        generator: of the draws.
    """
    weights, found = torch.sigmoid(scores), list[list[int]]()
    for _ in range(_TRIES):
        if len(found) == sets:
            break
        blocks = draw(weights, count, generator)
        if blocks not in found:
            found.append(blocks)
    return found


def updated(scores: Tensor, suppressed: Sequence[Sequence[int]], losses: Sequence[float], rate: float) -> Tensor:
    """Return the scores after losses with blocks suppressed: `I_i + rate * r_k * p_i (1 - p_i)` for each i in set k.

    There `r_k = exp(-l_k) - mean exp(-l)` and `p = sigmoid(I)`, before the update. A block without which the loss is
    smaller becomes less important; where all losses are equal, nothing changes.

    Args:
        scores: I, `[L]`, float64.
        suppressed: the sets of blocks.
        losses: one for each set; where a reward is not finite, the scores stay.
        rate: the learning rate.

    Example:
        >>> updated(torch.zeros(3, dtype=torch.float64), [[0], [1]], [0.0, 1.0], rate=10.0)
        tensor([ 0.7902, -0.7902,  0.0000], dtype=torch.float64)
    """
    rewards = torch.exp(-torch.tensor(losses, dtype=scores.dtype))
    rewards = rewards - rewards[0]  # so that rewards that are equal are so without rounding
    rewards = rewards - rewards.mean()
    if not rewards.isfinite().all():
        return scores
    p, changed = torch.sigmoid(scores), scores.clone()
    for blocks, reward in zip(suppressed, rewards, strict=True):
        changed[list(blocks)] += rate * reward * (p * (1 - p))[list(blocks)]
    return changed
