"""The interventions of a sweep: activations read once, probes fitted once, and the best heads of one ranking."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_peft.backbone.heads import HeadSite
from lightning_peft.editing.collect import capture_tokens
from lightning_peft.editing.iti import HeadEdit, compute_iti, head_shapes
from lightning_peft.sweep.settings import Sweep
from lightning_peft.sweep.texts import SplitTexts, Text


class Statements:
    """Head outputs at the end of every text that any split learns from, each read once.

    Args:
        backbone: the base.
        sites: its `head_sites`.
        splits: what is learnt from.
    """

    def __init__(self, backbone: nn.Module, sites: Sequence[HeadSite], splits: Iterable[SplitTexts]) -> None:
        labels: dict[Text, int] = {}
        for texts in splits:
            labels |= texts.labels
        self._rows = {text: row for row, text in enumerate(labels)}
        self.activations = capture_tokens(backbone, sites, [tokens for _, tokens in labels])
        self.shapes = head_shapes(sites)
        self.label = torch.tensor(list(labels.values()))
        self.group = torch.tensor([group for group, _ in labels])

    def of(self, texts: SplitTexts) -> tuple[Tensor, Tensor, Tensor]:
        """Return activations `[N, layers, heads, head_dim]`, labels `[N]` and groups `[N]` of what a split learns from.

        The rows are in the order in which texts were read, whatever the split's.
        """
        rows = torch.tensor(sorted(self._rows[text] for text in texts.labels))
        return self.activations[rows], self.label[rows], self.group[rows]


def fit(plan: Sweep, statements: Statements, texts: SplitTexts) -> HeadEdit:
    """Compute the intervention of the largest number of heads from what a split learns from, and nothing else."""
    return compute_iti(
        *statements.of(texts),
        num_heads=max(plan.num_heads),
        direction=plan.direction,
        val_fraction=plan.val_fraction,
        C=plan.C,
        seed=plan.seed,
        shapes=statements.shapes,
    )


def best_heads(edit: HeadEdit, count: int) -> HeadEdit:
    """Return the intervention on the best `count` of an intervention's heads."""
    record = edit.record | {name: edit.record[name][:count] for name in ("heads", "sigma") if name in edit.record}
    return replace(
        edit,
        heads=edit.heads[:count],
        directions=edit.directions[:count],
        sigma=edit.sigma[:count],
        record=record,
    )
