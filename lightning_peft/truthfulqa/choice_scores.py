"""What a test of the benchmark's batches measures, choice by choice, gathered while a Trainer runs it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_peft.tasks.unit_scores import UnitScores
from lightning_peft.truthfulqa.metrics import mc1

_METRICS = ("mc0", "mc1", "mc2")  # of which each choice says what it is to them


class ChoiceScores(UnitScores):
    """Keeps every choice's log-probability, every document's effects and whether each simple question was answered.

    Args:
        score: gives a question's scores by metric, from its choices' log-probabilities `[C]` and their columns.

    Attributes:
        choices: a dict for each choice: `question_id`, `index` among its question's, `logprob`, and what it is to each
            metric, `mc0`, `mc1` and `mc2`.
        documents: of each, its tokens, the cross-entropy of the base and of the adapted model, and KL.
        capability: by simple question, 1 where it was answered rightly.
    """

    def __init__(self, score: Callable[[Tensor, Mapping[str, Tensor]], dict[str, float]]) -> None:
        super().__init__()
        self.score = score
        self.choices: list[dict[str, Any]] = []
        self.documents: list[list[float]] = []
        self.capability: dict[int, float] = {}

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.choices, self.documents, self.capability = [], [], {}

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Tensor], *_: object
    ) -> None:
        if "document" in batch:
            self.documents += outputs.tolist()
            return
        if "capability" in batch:
            self.capability[int(batch["group"][0])] = mc1(outputs, batch["capability"].cpu())
            return
        for index, logprob in enumerate(outputs.tolist()):
            row = {"question_id": int(batch["group"][index]), "index": int(batch["choice"][index])}
            row["logprob"] = logprob
            self.choices.append(row | {name: int(batch[name][index]) for name in _METRICS})

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        questions: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for choice in self.choices:
            questions[choice["question_id"]].append(choice)
        self.columns = defaultdict(dict)
        for question, choices in questions.items():
            logprobs = torch.tensor([choice["logprob"] for choice in choices])
            columns = {name: torch.tensor([choice[name] for choice in choices]) for name in _METRICS}
            for name, value in self.score(logprobs, columns).items():
                self.columns[name][question] = value
