"""Inference-time intervention: which heads to move, in which direction, and how far."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_peft.backbone.heads import HeadSite
from lightning_peft.editing.directions import (
    DIRECTIONS,
    check_apart,
    contrast_pairs,
    mass_mean,
    principal,
    probe_weight,
    projection_std,
    random_directions,
    unit,
)
from lightning_peft.editing.heads import head_offsets_config
from lightning_peft.editing.probes import CCSProbes, LogisticProbes
from lightning_peft.stack.computed import ComputedAdapter, saved_key
from lightning_peft.stack.gates import truth_gate

STRENGTHS = ("equal", "accuracy")

# Where the authors' multiple-choice scoring edits, which is not where their generation does (that is "answer"): from
# the second answer token on, so that the first two answer tokens are predicted by the unedited model.
REFERENCE_POSITIONS = "generated[1:]"


@dataclass(frozen=True)
class HeadEdit:
    """A computed intervention on `K` heads.

    Args:
        heads: `(layer, head)` of each, best first.
        directions: `[K, head_dim]`, unit length.
        sigma: `[K]`, spread of the activations along the direction.
        accuracy: `[layers, heads]`, validation accuracy of every head's probe.
        record: JSON-able: how it was computed.
        strength: `[K]`, each head's share of the strength, mean 1; None where all are equal.
        probe: `[K, head_dim + 1]`, of each head, for gates: it fires at what the head's probe finds untrue.
    """

    heads: list[tuple[int, int]]
    directions: Tensor
    sigma: Tensor
    accuracy: Tensor
    record: dict[str, Any]
    strength: Tensor | None = None
    probe: Tensor | None = None

    def config(self, sites: Sequence[HeadSite], alpha: float, positions: str, **gate: Any) -> Any:
        """Return the `HeadOffsetsConfig` of this edit."""
        return head_offsets_config(sites, self.heads, alpha=alpha, positions=positions, **gate)

    def adapter(self, sites: Sequence[HeadSite], alpha: float, positions: str, **gate: Any) -> ComputedAdapter:
        """Return the head-offsets adapter of this edit.

        Args:
            sites: the `head_sites` of the model it was computed for.
            alpha: the strength.
            positions: which tokens are edited.
            **gate: `gate`, `beta` and `threshold`, see `lightning_peft.stack.gates`.
        """
        config = self.config(sites, alpha, positions, **gate)
        values = {"head_offsets": self.offsets(sites)}
        if config.gate is not None:
            values["head_offsets_probe"] = self.probes(sites)
        tensors = {saved_key(site, kind): v for kind, by_site in values.items() for site, v in by_site.items()}
        return ComputedAdapter(config, tensors, self.record)

    def offsets(self, sites: Sequence[HeadSite]) -> dict[str, Tensor]:
        """Return each edited site's `strength * sigma * direction` of its heads in ascending order, `[k, head_dim]`."""
        length = self.sigma if self.strength is None else self.strength * self.sigma
        offsets = self._by_site(sites, length[:, None] * self.directions)
        return {site.name: offsets[site.name][:, : site.head_dim] for site in sites if site.name in offsets}

    def probes(self, sites: Sequence[HeadSite]) -> dict[str, Tensor]:
        """Return each edited site's probes of its heads in ascending order, `[k, head_dim + 1]`."""
        assert self.probe is not None
        probes = self._by_site(sites, self.probe)
        return {
            site.name: torch.cat([probes[site.name][:, : site.head_dim], probes[site.name][:, -1:]], -1)
            for site in sites
            if site.name in probes
        }

    def _by_site(self, sites: Sequence[HeadSite], vectors: Tensor) -> dict[str, Tensor]:
        by_site: dict[str, list[tuple[int, Tensor]]] = {}
        for (layer, head), vector in zip(self.heads, vectors, strict=True):
            by_site.setdefault(sites[layer].name, []).append((head, vector))
        ordered = {name: sorted(rows, key=lambda row: row[0]) for name, rows in by_site.items()}
        return {name: torch.stack([vector for _, vector in rows]) for name, rows in ordered.items()}


def head_shapes(sites: Sequence[HeadSite]) -> list[tuple[int, ...]] | None:
    """Return heads and head size of each site, for `compute_iti`; None where they are the same everywhere."""
    shapes = [site.shape for site in sites]
    return shapes if len(set(shapes)) > 1 else None


def compute_iti(
    activations: Tensor,
    truth: Tensor,
    question_id: Tensor,
    num_heads: int = 48,
    direction: str = "mass_mean",
    val_fraction: float = 0.2,
    C: float = 1.0,
    seed: int = 0,
    strength: str = "equal",
    sigma_activations: Tensor | None = None,
    reference: bool = False,
    shapes: Sequence[tuple[int, ...]] | None = None,
) -> HeadEdit:
    """Fit a probe to every head, rank the heads on held-out questions, and compute direction and spread of the best.

    Li et al. 2023, arXiv:2306.03341. Heads are ranked by validation accuracy, ties by validation log-loss. The mass
    mean and sigma come from all examples given, which must be training questions only.

    With `reference` everything is as in the authors' code (honest_llama, `legacy/`): the inner split is numpy's
    `RandomState(seed).choice` among the question ids, the probes are fitted to features as they are, and of heads that
    are equally accurate the later one comes first.

    Args:
        activations: `[N, layers, heads, head_dim]`, last-token head outputs of N labelled statements.
        truth: `[N]`, 1 for true statements, 0 for false ones.
        question_id: `[N]`; statements of one question stay on one side of the inner split.
        num_heads: how many heads to edit (K).
        direction: `"mass_mean"`, `"probe_weight"`, `"ccs"` (contrast-consistent search) or `"pca"` (representation
            engineering's reading vector), these two on `contrast_pairs`, or `"random"` (the control: the mass-mean
            edit's heads and lengths, in random directions).
        val_fraction: share of the questions held out to rank heads.
        C: inverse strength of the probes' L2 penalty.
        seed: of the inner split, of pairs and of random directions.
        strength: `"equal"`, or `"accuracy"`: each head's share is in proportion to its accuracy above chance, the
            mean share 1.
        sigma_activations: `[M, layers, heads, head_dim]`, head outputs at the last token of other texts, of training
            questions too, from which to take sigma; default the statements.
        reference: compute what the authors' code computes; needs `sigma_activations`.
        shapes: heads and head size of each layer, where these differ and zeros fill up the activations.

    Raises:
        ValueError: more heads asked for than there are, one class only, too few questions, rows that do not match,
            activations that are not finite, or no head above chance to share strength by.
    """
    _check(activations, truth, question_id, sigma_activations)
    layers, heads, width = activations.shape[1:]
    real = torch.tensor([[h < count for h in range(heads)] for count, *_ in shapes or [(heads,)] * layers]).flatten()
    if not 1 <= num_heads <= int(real.sum()):
        raise ValueError(f"num_heads is {num_heads}, but the model has {int(real.sum())} heads ({layers} x {heads}).")
    check_names(direction, strength)
    if reference and sigma_activations is None:
        raise ValueError("The authors' sigma is that of texts that end in a question: give sigma_activations.")

    x = activations.reshape(len(activations), layers * heads, width).float()
    if reference:
        train, val = reference_split(question_id, val_fraction, seed)
    else:
        train, val = _split_of_both_classes(truth, question_id, val_fraction, seed)
    for name, rows in (("training", train), ("validation", val)):
        if len(truth[rows].unique()) < 2:
            raise ValueError(
                f"The inner {name} split has statements of one class only: give more questions (groups), or ones that "
                "have statements of both classes."
            )
    probes = LogisticProbes(C=C, standardize=not reference).fit(x[train], truth[train])
    accuracy = probes.score(x[val], truth[val])
    if reference:
        best_first = accuracy.argsort(stable=True).flip(0)
        ranked: list[int] = best_first[real[best_first]][:num_heads].tolist()
    else:
        loss = probes.log_loss(x[val], truth[val])
        ranked = sorted(range(layers * heads), key=lambda g: (not real[g], -float(accuracy[g]), float(loss[g])))
        ranked = ranked[:num_heads]
    chosen = torch.tensor(ranked)

    z = x[:, chosen]
    sizes = None if shapes is None else [shapes[g // heads][1] for g in ranked]
    directions = _in_heads(_directions(direction, z, truth, question_id, probes.coef_[chosen], seed), sizes)
    others = z if sigma_activations is None else sigma_activations.flatten(1, 2)[:, chosen].float()
    sigma = projection_std(others, directions)
    if direction == "random":  # of the same lengths, so that only the direction differs
        directions = _in_heads(random_directions(num_heads, width, seed), sizes)
    share = _shares(accuracy[chosen]) if strength == "accuracy" else None
    record = {
        "method": "iti",
        "reference": reference,
        "direction": direction,
        "heads": [[g // heads, g % heads] for g in ranked],
        "accuracy": [[round(float(a), 6) for a in row] for row in accuracy.reshape(layers, heads)],
        "sigma": [float(s) for s in sigma],
        "sigma_texts": len(others),
        "strength": None if share is None else [float(s) for s in share],
        "statements": len(truth),
        "questions": len(question_id.unique()),
        "validation_questions": len(question_id[val].unique()),
        "C": C,
        "seed": seed,
        "data_hash": _hash(activations, truth, question_id),
    }
    pairs = [(g // heads, g % heads) for g in ranked]
    gate = truth_gate(probes.coef_[chosen], probes.intercept_[chosen])
    return HeadEdit(pairs, directions, sigma, accuracy.reshape(layers, heads), record, share, gate)


def _in_heads(directions: Tensor, sizes: Sequence[int] | None) -> Tensor:
    """Return directions `[K, head_dim]` of length 1 that are zero where their heads are filled up."""
    if sizes is None:
        return directions
    inside = torch.arange(directions.shape[1]) < torch.tensor(sizes)[:, None]
    return unit(directions * inside)


def check_names(direction: str, strength: str) -> None:
    """Refuse a direction or a strength that there is not."""
    for name, value, known in (("direction", direction, DIRECTIONS), ("strength", strength, STRENGTHS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")


def split_questions(question_id: Tensor, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the rows of an inner training and validation split that keeps each question whole."""
    from sklearn.model_selection import GroupShuffleSplit

    if len(question_id.unique()) < 2:
        raise ValueError("An inner validation split needs statements of at least two questions.")
    splitter = GroupShuffleSplit(n_splits=1, test_size=val_fraction, random_state=seed)
    train, val = next(splitter.split(question_id.numpy(), groups=question_id.numpy()))
    return torch.from_numpy(train), torch.from_numpy(val)


def _split_of_both_classes(truth: Tensor, question_id: Tensor, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split as `split_questions` with the first seed from `seed` on that leaves both classes on both sides.

    Few texts that are each their own group are often split so that one side has a single class. Where a hundred seeds
    do not help, the split of `seed` itself is returned.
    """
    for other in range(seed, seed + 100):
        train, val = split_questions(question_id, val_fraction, other)
        if all(len(truth[rows].unique()) > 1 for rows in (train, val)):
            return train, val
    return split_questions(question_id, val_fraction, seed)


def reference_split(question_id: Tensor, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split as `split_questions`, but drawn as in the authors' code: among the questions in the release's order."""
    import numpy as np

    questions = question_id.unique().numpy()  # in ascending order
    size = int(len(questions) * (1 - val_fraction))
    chosen = torch.from_numpy(np.random.RandomState(seed).choice(questions, size=size, replace=False))
    inside = torch.isin(question_id, chosen)
    return inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]


def _shares(accuracy: Tensor) -> Tensor:
    """Return shares in proportion to accuracy above chance, `[K]`, of mean 1; a head below chance gets none."""
    above = (accuracy - 0.5).clamp(min=0)
    if not above.any():
        raise ValueError('No head is better than chance on the held-out questions: use strength="equal".')
    return above / above.mean()


def _directions(name: str, z: Tensor, truth: Tensor, question_id: Tensor, coef: Tensor, seed: int) -> Tensor:
    """Return the chosen heads' directions, `[K, head_dim]`; for `"random"` the mass mean, whose sigma it takes."""
    if name == "probe_weight":
        return unit(coef.float())
    if name not in ("ccs", "pca"):
        return mass_mean(z, truth)
    pairs = contrast_pairs(truth, question_id, seed)
    if len(pairs) < 2:
        raise ValueError(
            f"direction {name!r} needs at least two questions with both a true and a false statement: give texts that "
            "belong together one group."
        )
    if name == "pca":
        return principal(z, truth, pairs)
    return probe_weight(CCSProbes(seed=seed).fit(z, truth, pairs)).float()


def _check(activations: Tensor, truth: Tensor, question_id: Tensor, others: Tensor | None) -> None:
    if len({len(activations), len(truth), len(question_id)}) > 1:
        raise ValueError(
            f"{len(activations)} activations, {len(truth)} truth values and {len(question_id)} question ids were "
            "given: one of each is needed for every statement."
        )
    if others is not None and others.shape[1:] != activations.shape[1:]:
        raise ValueError(
            f"sigma_activations are of heads {tuple(others.shape[1:])}, but those of the statements are "
            f"{tuple(activations.shape[1:])}."
        )
    for values in (activations,) if others is None else (activations, others):
        finite = torch.isfinite(values).all(-1).all(0)
        if not finite.all():
            layer, head = (int(i) for i in (~finite).nonzero()[0])
            raise ValueError(f"The activations of layer {layer}, head {head} contain NaN or infinite values.")
    if (kinds := set(truth.unique().tolist())) != {0, 1}:
        raise ValueError(f"Statements of both classes are needed, truth 0 and 1; the values given are {sorted(kinds)}.")
    check_apart(activations, truth)


def _hash(activations: Tensor, truth: Tensor, question_id: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in (activations.float(), truth.long(), question_id.long()):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
