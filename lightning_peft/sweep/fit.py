"""The interventions of a sweep: activations read once, probes fitted once, and the best heads of one ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_peft.backbone.heads import HeadSite
from lightning_peft.editing.collect import capture_tokens
from lightning_peft.editing.iti import HeadEdit, compute_iti
from lightning_peft.sweep.settings import Sweep
from lightning_peft.truthfulqa.datamodule import TruthfulQADataModule
from lightning_peft.truthfulqa.questions import Question


class Statements:
    """Head outputs at the end of every statement that any fold learns from, each read once.

    Args:
        backbone: the base.
        sites: its `head_sites`.
        folds: data modules with `train="statements"`, set up.
    """

    def __init__(self, backbone: nn.Module, sites: Sequence[HeadSite], folds: Sequence[TruthfulQADataModule]) -> None:
        truths: dict[tuple[int, tuple[int, ...]], int] = {}
        for data in folds:
            for batch in data.train_dataloader():
                columns = batch["input_ids"], batch["attention_mask"].bool(), batch["label"], batch["group"]
                for ids, real, truth, question in zip(*columns, strict=True):
                    truths[int(question), tuple(ids[real].tolist())] = int(truth)
        self.activations = capture_tokens(backbone, sites, [tokens for _, tokens in truths])
        self.truth = torch.tensor(list(truths.values()))
        self.question_id = torch.tensor([question for question, _ in truths])

    def of(self, questions: Sequence[Question]) -> tuple[Tensor, Tensor, Tensor]:
        """Return activations `[N, layers, heads, head_dim]`, truth `[N]` and question ids `[N]` of some questions."""
        inside = torch.isin(self.question_id, torch.tensor([question.id for question in questions]))
        return self.activations[inside], self.truth[inside], self.question_id[inside]


def fit(plan: Sweep, statements: Statements, questions: Sequence[Question]) -> HeadEdit:
    """Compute the intervention of the largest number of heads from these questions alone."""
    return compute_iti(
        *statements.of(questions),
        num_heads=max(plan.num_heads),
        direction=plan.direction,
        val_fraction=plan.val_fraction,
        C=plan.C,
        seed=plan.seed,
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
