"""Cross-entropy and KL of text as a metric, over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class TextEffects(Metric):
    """Cross-entropy with and without the adapter and KL(base ‖ adapted), per token over all documents so far.

    Example:
        >>> metric = TextEffects()
        >>> metric.update(torch.tensor([[10.0, 20.0, 30.0, 5.0], [30.0, 20.0, 50.0, 3.0]]))
        >>> metric.compute()
        {'ce_base': 1.0, 'ce': 2.0, 'kl': 0.2}
    """

    is_differentiable = False
    full_state_update = False
    rows: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor, document: Tensor | None = None) -> None:
        """Add documents.

        Args:
            values: `[B, 4]` as `batch_effects` gives them.
            document: `[B]`, their numbers; a document that comes again, as samplers of several processes repeat some,
                counts once. Without numbers each counts.
        """
        numbers = torch.full((len(values),), -1) if document is None else document
        self.rows.append(torch.cat([numbers.cpu()[:, None], values.cpu()], dim=1).double().to(self.device))

    def compute(self) -> dict[str, float]:
        """Return `ce_base`, `ce` and `kl`, in nats per token; nothing where there was no text."""
        rows = dim_zero_cat(self.rows).tolist()
        once = {row[0]: row[1:] for row in rows if row[0] >= 0}
        counted = [*once.values(), *(row[1:] for row in rows if row[0] < 0)]
        tokens, *sums = (sum(column) for column in zip(*counted, strict=True))
        return {name: value / tokens for name, value in zip(("ce_base", "ce", "kl"), sums, strict=True) if tokens}
