"""Vectors that lead from what is not wanted to what is: mean differences, two prompts', principal components."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_peft.editing.directions import check_apart, contrast_pairs, mass_mean, principal, projection_std
from lightning_peft.editing.probes import LogisticProbes
from lightning_peft.stack.gates import truth_gate


@dataclass(frozen=True)
class LayerEdit:
    """Computed vectors for some sites.

    Args:
        vectors: `[S, width]`, one for each site, or `[S, tokens, width]`.
        record: JSON-able: how they were computed.
        probe: `[S, width + 1]`, of each site, for gates: it fires at what the site's probe finds untrue.
    """

    vectors: Tensor
    record: dict[str, Any] = field(default_factory=dict)
    probe: Tensor | None = None


def caa_vectors(activations: Tensor, truth: Tensor, question_id: Tensor) -> Tensor:
    """Return the mean difference within contrast pairs, `[S, width]` (CAA; Rimsky et al. 2023, arXiv:2312.06681).

    Each question's pairs are all of its true statements with all of its false ones, and each question counts the same:
    the mean over questions of the true statements' mean minus the false ones'.

    Args:
        activations: `[N, S, width]`, at the last token of each statement.
        truth: `[N]`, 1 or 0.
        question_id: `[N]`; questions without statements of both kinds are left out.

    Raises:
        ValueError: no question has both kinds.

    Example:
        >>> x = torch.tensor([1.0, 4.0, 0.0, 9.0])[:, None, None]
        >>> caa_vectors(x, torch.tensor([1, 0, 0, 1]), torch.tensor([0, 0, 0, 5]))
        tensor([[-1.]])
    """
    questions, number = question_id.unique(return_inverse=True)
    means, counts = [], []
    for label in (1, 0):
        rows = truth == label
        counts.append(number[rows].bincount(minlength=len(questions)))
        total = activations.new_zeros(len(questions), *activations.shape[1:], dtype=torch.float64)
        total.index_add_(0, number[rows], activations[rows].double())
        means.append(total / counts[-1].clamp(min=1)[:, None, None])
    both = (counts[0] > 0) & (counts[1] > 0)
    if not both.any():
        raise ValueError(
            "No question has both a true and a false statement, so that there is no pair to compare: give texts that "
            "belong together, some true and some false, one group."
        )
    _warn_of_unpaired(int((~both).sum()), len(questions))
    return (means[0] - means[1])[both].mean(0).float()


def repe_vectors(activations: Tensor, truth: Tensor, question_id: Tensor, seed: int = 0) -> Tensor:
    """Return the first principal component of pair differences, `[S, width]` (RepE, Zou et al. 2023, arXiv:2310.01405).

    It points to the true statements and is as long as the activations' standard deviation along it.

    Args:
        activations, truth, question_id: as `caa_vectors`.
        seed: which pair of statements stands for each question.
    """
    pairs = contrast_pairs(truth, question_id, seed)
    if len(pairs) < 2:
        raise ValueError(
            "A principal component needs at least two questions with both a true and a false statement: give texts "
            "that belong together one group."
        )
    _check_pairs(activations, pairs)
    _warn_of_unpaired(len(question_id.unique()) - len(pairs), len(question_id.unique()))
    directions = principal(activations.float(), truth, pairs)
    return directions * projection_std(activations.float(), directions)[:, None]


def act_add_vectors(add: Tensor, subtract: Tensor) -> Tensor:
    """Return the difference of two prompts, `[S, tokens, width]` (ActAdd, Turner et al. 2023, arXiv:2308.10248).

    Args:
        add: `[tokens, S, width]`, activations at every token of the prompt to lead to.
        subtract: the same of the other prompt, made as long.
    """
    if add.shape != subtract.shape:
        raise ValueError(f"The prompts have {len(add)} and {len(subtract)} tokens: make them of one length.")
    return (add - subtract).transpose(0, 1).float()


def ablation_direction(activations: Tensor, truth: Tensor) -> Tensor:
    """Return the difference in means, unit length, `[S, width]` (Arditi et al. 2024, arXiv:2406.11717).

    Args:
        activations: `[N, S, width]`.
        truth: `[N]`, 1 or 0.
    """
    return mass_mean(activations.float(), truth)


def site_probes(activations: Tensor, truth: Tensor, C: float = 1.0) -> Tensor:
    """Fit logistic probes for gates, one for each site, `[S, width + 1]`; they fire at what is untrue.

    Args:
        activations, truth: as `caa_vectors`.
        C: inverse strength of their L2 penalty.
    """
    probes = LogisticProbes(C=C).fit(activations.float(), truth)
    return truth_gate(probes.coef_, probes.intercept_)


def check_statements(activations: Tensor, truth: Tensor) -> None:
    """Raise `ValueError` unless there are statements of both kinds, with activations that are finite."""
    finite = torch.isfinite(activations).all(-1).all(0)
    if not finite.all():
        raise ValueError(f"The activations of site {int((~finite).nonzero()[0])} contain NaN or infinite values.")
    if (kinds := set(truth.unique().tolist())) != {0, 1}:
        raise ValueError(f"Statements of both classes are needed, truth 0 and 1; the values given are {sorted(kinds)}.")
    check_apart(activations, truth)


def _check_pairs(activations: Tensor, pairs: Tensor) -> None:
    """Raise `ValueError` where both sides of each pair are the same, but for rounding."""
    differences = activations[pairs[:, 0]] - activations[pairs[:, 1]]
    if float(differences.abs().max()) <= 1e-6 * float(activations.abs().max()):
        raise ValueError(
            "The true and the false statement of each question are the same to the model, so that no direction leads "
            "from one to the other: check that their texts differ, and that they were not cut."
        )


def _warn_of_unpaired(count: int, total: int) -> None:
    if count:
        warnings.warn(
            f"{count} of {total} questions (groups) have no true or no false statement and are left out: only texts of "
            "one group are compared.",
            stacklevel=3,
        )


def data_hash(*tensors: Tensor) -> str:
    """Return the SHA-256 of the tensors that an edit was computed from."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
