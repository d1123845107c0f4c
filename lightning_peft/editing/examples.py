"""Refuse examples that nothing can be fitted to."""

from __future__ import annotations

import torch
from torch import Tensor


def check_examples(x: Tensor, y: Tensor | None = None) -> None:
    """Refuse what no probe can be fitted to.

    Raises:
        ValueError: features that are not `[N, G, d]` or not finite; labels that are not one a row, of one class only,
            or other than 0 and 1.
    """
    if x.dim() != 3:
        raise ValueError(f"Probes take features [N, groups, features], but these have shape {tuple(x.shape)}.")
    if y is not None and y.shape != x.shape[:1]:
        raise ValueError(f"{len(x)} examples need {len(x)} labels, but the labels have shape {tuple(y.shape)}.")
    if y is not None and (labels := set(y.unique().tolist())) != {0, 1}:
        found = ", ".join(str(v) for v in sorted(labels))
        raise ValueError(f"A probe needs examples of both classes, 0 and 1; the labels given are: {found}.")
    if not torch.isfinite(x.sum()):  # a sum is finite only where all are, or nearly all are huge
        finite = torch.isfinite(x).all(-1).all(0)
        if not finite.all():
            group = int((~finite).nonzero()[0])
            raise ValueError(f"The activations of probe {group} contain NaN or infinite values.")
