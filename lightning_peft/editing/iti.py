"""Inference-time intervention: which heads to move, in which direction, and how far."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_peft.editing.directions import DIRECTIONS, mass_mean, projection_std, random_directions, unit
from lightning_peft.editing.heads import HeadSite, head_offsets_config
from lightning_peft.editing.probes import LogisticProbes


@dataclass(frozen=True)
class HeadEdit:
    """A computed intervention on `K` heads.

    Args:
        heads: `(layer, head)` of each, best first.
        directions: `[K, head_dim]`, unit length.
        sigma: `[K]`, spread of the activations along the direction.
        accuracy: `[layers, heads]`, validation accuracy of every head's probe.
        record: JSON-able: how it was computed.
    """

    heads: list[tuple[int, int]]
    directions: Tensor
    sigma: Tensor
    accuracy: Tensor
    record: dict[str, Any]

    def config(self, sites: Sequence[HeadSite], alpha: float, positions: str) -> Any:
        """The `HeadOffsetsConfig` of this edit."""
        return head_offsets_config(sites, self.heads, alpha=alpha, positions=positions)

    def offsets(self, sites: Sequence[HeadSite]) -> dict[str, Tensor]:
        """For each edited site, `sigma * direction` of its heads in ascending order, `[k, head_dim]`."""
        by_site: dict[str, list[tuple[int, Tensor]]] = {}
        for i, (layer, head) in enumerate(self.heads):
            by_site.setdefault(sites[layer].name, []).append((head, self.sigma[i] * self.directions[i]))
        ordered = {name: sorted(rows, key=lambda row: row[0]) for name, rows in by_site.items()}
        return {name: torch.stack([vector for _, vector in rows]) for name, rows in ordered.items()}


def compute_iti(
    activations: Tensor,
    truth: Tensor,
    question_id: Tensor,
    num_heads: int = 48,
    direction: str = "mass_mean",
    val_fraction: float = 0.2,
    C: float = 1.0,
    seed: int = 0,
) -> HeadEdit:
    """Fit a probe to every head, rank the heads on held-out questions, and compute direction and spread of the best.

    Li et al. 2023, arXiv:2306.03341. Heads are ranked by validation accuracy, ties by validation log-loss. The mass
    mean and sigma come from all examples given, which must be training questions only.

    Args:
        activations: `[N, layers, heads, head_dim]`, last-token head outputs of N labelled statements.
        truth: `[N]`, 1 for true statements, 0 for false ones.
        question_id: `[N]`; statements of one question stay on one side of the inner split.
        num_heads: how many heads to edit (K).
        direction: `"mass_mean"`, `"probe_weight"`, or `"random"` (the control: the mass-mean edit's heads and
            lengths, in random directions).
        val_fraction: share of the questions held out to rank heads.
        C: inverse strength of the probes' L2 penalty.
        seed: of the inner split and of random directions.

    Raises:
        ValueError: more heads asked for than there are, one class only, too few questions, rows that do not match, or
            activations that are not finite.
    """
    layers, heads, width = activations.shape[1:]
    if len({len(activations), len(truth), len(question_id)}) > 1:
        raise ValueError(
            f"{len(activations)} activations, {len(truth)} truth values and {len(question_id)} question ids were "
            "given: one of each is needed for every statement."
        )
    if not 1 <= num_heads <= layers * heads:
        raise ValueError(f"num_heads is {num_heads}, but the model has {layers * heads} heads ({layers} x {heads}).")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}.")
    finite = torch.isfinite(activations).all(-1).all(0)
    if not finite.all():
        layer, head = (int(i) for i in (~finite).nonzero()[0])
        raise ValueError(f"The activations of layer {layer}, head {head} contain NaN or infinite values.")
    if (found := set(truth.unique().tolist())) != {0, 1}:
        raise ValueError(f"Statements of both classes are needed, truth 0 and 1; the values given are {sorted(found)}.")

    x = activations.reshape(len(activations), layers * heads, width).float()
    train, val = split_questions(question_id, val_fraction, seed)
    for name, rows in (("training", train), ("validation", val)):
        if len(truth[rows].unique()) < 2:
            raise ValueError(f"The inner {name} split has statements of one class only: give more questions.")
    probes = LogisticProbes(C=C).fit(x[train], truth[train])
    accuracy = probes.score(x[val], truth[val])
    loss = probes.log_loss(x[val], truth[val])
    ranked = sorted(range(layers * heads), key=lambda g: (-float(accuracy[g]), float(loss[g])))[:num_heads]
    chosen = torch.tensor(ranked)

    directions = unit(probes.coef_[chosen].float()) if direction == "probe_weight" else mass_mean(x[:, chosen], truth)
    sigma = projection_std(x[:, chosen], directions)
    if direction == "random":  # of the same lengths, so that only the direction differs
        directions = random_directions(num_heads, width, seed)
    record = {
        "method": "iti",
        "direction": direction,
        "heads": [[g // heads, g % heads] for g in ranked],
        "accuracy": [[round(float(a), 6) for a in row] for row in accuracy.reshape(layers, heads)],
        "sigma": [float(s) for s in sigma],
        "statements": len(truth),
        "questions": len(question_id.unique()),
        "validation_questions": len(question_id[val].unique()),
        "C": C,
        "seed": seed,
        "data_hash": _hash(activations, truth, question_id),
    }
    pairs = [(g // heads, g % heads) for g in ranked]
    return HeadEdit(pairs, directions, sigma, accuracy.reshape(layers, heads), record)


def split_questions(question_id: Tensor, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row indices of an inner training and validation split that keeps each question whole."""
    from sklearn.model_selection import GroupShuffleSplit

    if len(question_id.unique()) < 2:
        raise ValueError("An inner validation split needs statements of at least two questions.")
    splitter = GroupShuffleSplit(n_splits=1, test_size=val_fraction, random_state=seed)
    train, val = next(splitter.split(question_id.numpy(), groups=question_id.numpy()))
    return torch.from_numpy(train), torch.from_numpy(val)


def _hash(activations: Tensor, truth: Tensor, question_id: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in (activations.float(), truth.long(), question_id.long()):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
