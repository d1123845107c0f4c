"""Unit directions in head space along which to move, and how far the activations spread along them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.editing.probes import LinearProbes

DIRECTIONS = ("mass_mean", "probe_weight", "ccs", "pca", "random")  # those that ITI offers by name


def mass_mean(x: Tensor, y: Tensor) -> Tensor:
    """Return the true examples' mean minus the false ones', unit length: `[G, d]` from `x [N, G, d]`, `y [N]`.

    Li et al. 2023 (arXiv:2306.03341), "mass mean shift".
    """
    return unit(x[y == 1].mean(0) - x[y == 0].mean(0))


def probe_weight(probes: LinearProbes) -> Tensor:
    """Return the unit normals of fitted probes' planes, `[G, d]`, in the space of the raw features.

    Whatever linear probes are given: logistic ones for Li et al.'s "probe weight", `CCSProbes` for their "CCS".
    """
    return unit(probes.coef_)


def principal(x: Tensor, y: Tensor, pairs: Tensor | None = None) -> Tensor:
    """Return the direction of greatest variance, turned towards the true examples: `[G, d]`, unit length.

    With pairs this is representation engineering's reading vector (Zou et al. 2023, arXiv:2310.01405): the first
    principal component of the differences within pairs, about 0, so that the order within a pair does not matter.

    Args:
        x: `[N, G, d]`.
        y: `[N]`, 0 or 1, for the sign only.
        pairs: `[P, 2]` rows of `x` to take differences of; default the examples themselves, about their mean.
    """
    z = (x[pairs[:, 0]] - x[pairs[:, 1]] if pairs is not None else x - x.mean(0)).transpose(0, 1).double()
    component = torch.linalg.eigh(z.mT @ z).eigenvectors[..., -1]
    along = (component * mass_mean(x.double(), y)).sum(-1, keepdim=True)
    return unit(torch.where(along < 0, -component, component)).to(x.dtype)


def contrast_pairs(truth: Tensor, question_id: Tensor, seed: int = 0) -> Tensor:
    """Draw one true and one false statement of each question: the pairs that CCS and reading vectors compare.

    The order of the two is drawn too: a side that is always the true one would tell CCS the truth, and centring the
    sides would take it away again.

    Args:
        truth: `[N]`, 0 or 1.
        question_id: `[N]`; a question without statements of both classes gives no pair.
        seed: of the draw.

    Returns:
        `[P, 2]` row numbers.

    Example:
        >>> sorted(contrast_pairs(torch.tensor([1, 0, 1, 1]), torch.tensor([7, 7, 9, 9]))[0].tolist())
        [0, 1]
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for question in question_id.unique():
        sides = [((question_id == question) & (truth == label)).nonzero()[:, 0] for label in (0, 1)]
        if all(len(rows) for rows in sides):
            drawn = torch.stack([rows[torch.randint(len(rows), (), generator=generator)] for rows in sides])
            pairs.append(drawn.flip(0) if torch.rand((), generator=generator) < 0.5 else drawn)
    return torch.stack(pairs) if pairs else torch.zeros(0, 2, dtype=torch.long)


def check_apart(x: Tensor, y: Tensor) -> None:
    """Raise `ValueError` where the means of true and false examples are the same everywhere, but for rounding.

    Args:
        x: `[N, ..., d]`, read at some sites.
        y: `[N]`, of both classes.
    """
    flat, true = x.flatten(1), (y == 1).to(x.dtype)
    difference = (true / true.sum() - (1 - true) / (1 - true).sum()) @ flat
    low, high = flat.aminmax()
    if float(difference.abs().max()) <= 1e-6 * float(torch.maximum(-low, high)):
        raise ValueError(
            "What the model computes in true and in false statements is the same on average, so that the edit would be "
            "zero: check that their texts differ, and that they were not cut."
        )


def random_directions(groups: int, width: int, seed: int) -> Tensor:
    """Draw uniform random unit directions `[groups, width]`: the control that any effect must beat."""
    return unit(torch.randn(groups, width, generator=torch.Generator().manual_seed(seed)))


def projection_std(x: Tensor, directions: Tensor) -> Tensor:
    """Return the standard deviation (ddof 0) of `x [N, G, d]` along unit `directions [G, d]`: `[G]`."""
    return torch.einsum("ngd,gd->ng", x, directions).std(0, unbiased=False)


def unit(vectors: Tensor) -> Tensor:
    """Scale vectors to length 1 along the last axis; a zero vector stays zero."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
