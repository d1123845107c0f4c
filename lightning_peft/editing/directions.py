"""Unit directions in head space along which to move, and how far the activations spread along them."""

from __future__ import annotations

import torch
from torch import Tensor

DIRECTIONS = ("mass_mean", "probe_weight", "random")


def mass_mean(x: Tensor, y: Tensor) -> Tensor:
    """Mean of the true examples minus mean of the false ones, unit length: `[G, d]` from `x [N, G, d]`, `y [N]`.

    Li et al. 2023 (arXiv:2306.03341), "mass mean shift".
    """
    return unit(x[y == 1].mean(0) - x[y == 0].mean(0))


def random_directions(groups: int, width: int, seed: int) -> Tensor:
    """Uniform random unit directions `[groups, width]`: the control that any effect must beat."""
    return unit(torch.randn(groups, width, generator=torch.Generator().manual_seed(seed)))


def projection_std(x: Tensor, directions: Tensor) -> Tensor:
    """Standard deviation (ddof 0) of `x [N, G, d]` along unit `directions [G, d]`: `[G]`."""
    return torch.einsum("ngd,gd->ng", x, directions).std(0, unbiased=False)


def unit(vectors: Tensor) -> Tensor:
    """Vectors scaled to length 1 along the last axis; a zero vector stays zero."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
