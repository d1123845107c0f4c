"""Probability mass: how likely all choices of a question are together, with an adaptation and without it."""

from __future__ import annotations

import torch
from torch import Tensor


def choice_mass(adapted: Tensor, base: Tensor, question: Tensor) -> Tensor:
    """Return the log of the summed probability of each question's choices, adapted less base, `[Q]` in nats.

    A score that is a share among choices, such as the probability of the right ones over that of all, rises also under
    directions that destroy the distribution: where every choice has become improbable, the shares tend to the same
    value for right and wrong ones, and to a better one than that of a model which prefers the wrong. What such a share
    cannot show is this difference: 0 where the choices are as likely as before, far below 0 where the model would say
    something else altogether. In a comparison its mean is in nats a question.

    Args:
        adapted: `[N]`, log-probabilities of all choices of all questions under the adapted model.
        base: `[N]`, the same under the base model.
        question: `[N]`, integers, the question that each choice belongs to.

    Returns:
        One value a question, by ascending number, float64. NaN where the base gives its choices no probability at all.

    Raises:
        ValueError: the three have not the same number of entries, or a log-probability is above 0 or no number.

    Example:
        >>> halves, tenths = torch.tensor([0.25, 0.25, 0.5]).log(), torch.tensor([0.025, 0.025, 0.5]).log()
        >>> choice_mass(tenths, halves, torch.tensor([7, 7, 9]))
        tensor([-2.3026,  0.0000], dtype=torch.float64)
    """
    if not adapted.shape == base.shape == question.shape or adapted.dim() != 1:
        shapes = ", ".join(str(list(given.shape)) for given in (adapted, base, question))
        raise ValueError(f"Give two log-probabilities and a question for each choice, three of [N]; got {shapes}.")
    for values in (adapted, base):
        if not bool((values <= 1e-4).all()):  # rounding may leave that of a sure choice above 0
            raise ValueError(f"A log-probability is at most 0, got {float(values.max()):.4g}.")
    numbers, index = question.unique(return_inverse=True)
    return _summed(adapted, index, len(numbers)) - _summed(base, index, len(numbers))


def _summed(logprobs: Tensor, index: Tensor, groups: int) -> Tensor:
    """Return the log of the summed probabilities of each group, `[groups]`."""
    logprobs = logprobs.double()
    largest = logprobs.new_full((groups,), -torch.inf).scatter_reduce(0, index, logprobs, "amax")
    shift = largest.where(largest.isfinite(), torch.zeros_like(largest))
    return shift + torch.zeros_like(shift).index_add(0, index, (logprobs - shift[index]).exp()).log()
