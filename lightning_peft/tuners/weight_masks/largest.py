"""Find the largest entries of a tensor, exactly as many as are asked for."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(scores: Tensor, count: int, guess: float | None = None) -> tuple[Tensor, float | None]:
    """Return the mask of the `count` largest entries, the first ones where they tie, and the score it begins at.

    Scores move little from step to step, and the last threshold is often the next one, so that it need not be searched
    for: a guess is checked by counting, and makes no difference to the mask.

    Args:
        scores: any shape, finite.
        count: how many to choose, from 0 to all.
        guess: what may be the `count`-th largest score.

    Raises:
        ValueError: there are fewer entries.

    Example:
        >>> largest(torch.tensor([[3.0, 1.0], [2.0, 2.0]]), 2)
        (tensor([[ True, False],
                [ True, False]]), 2.0)
    """
    entries = scores.numel()
    if not 0 <= count <= entries:
        raise ValueError(f"{count} entries cannot be chosen among {entries}.")
    if count in (0, entries):
        return torch.full_like(scores, bool(count), dtype=torch.bool), None
    scores = scores.detach()
    if guess is not None and (mask := _from(scores, count, guess)) is not None:
        return mask, guess
    flat = scores.reshape(-1).to(torch.promote_types(scores.dtype, torch.float32))
    threshold = float(flat.kthvalue(entries - count + 1).values)
    mask = _from(scores, count, threshold)
    if mask is None:  # comparisons with NaN are false
        raise ValueError("No mask can be chosen: a score is NaN.")
    return mask, threshold


def _from(scores: Tensor, count: int, threshold: float) -> Tensor | None:
    """Return the mask if the threshold is the `count`-th largest score, else None."""
    at_least = scores >= threshold
    too_many = int(at_least.sum()) - count
    if too_many == 0:
        return at_least
    ties = (scores == threshold).reshape(-1)
    if not 0 < too_many < int(ties.sum()):
        return None
    mask = at_least.reshape(-1)
    mask[ties.nonzero()[-too_many:, 0]] = False
    return mask.reshape(scores.shape)
