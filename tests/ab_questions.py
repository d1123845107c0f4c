"""A task of a user's own: questions with two answers, from a list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lightning_peft.models import CausalLM
from lightning_peft.tasks import ChoiceTask, Measure, Split

QUESTIONS = [
    ("What is snow?", "white", "green"),
    ("What is tar?", "black", "pink"),
    ("What does a cow eat?", "grass", "steel"),
    ("What does a cat hunt?", "mice", "the moon"),
    ("What follows one?", "two", "nine"),
    ("What follows monday?", "tuesday", "may"),
    ("What is ice?", "cold", "hot"),
    ("What is the sun?", "a star", "a lamp"),
    ("Where do fish live?", "in water", "in trees"),
    ("Where do birds nest?", "in trees", "in soup"),
    ("What is a lie?", "not true", "true"),
    ("What is iron?", "a metal", "a fruit"),
]


class ABData(L.LightningDataModule):
    """Trains on each question with each answer, tests on a question's two answers."""

    def __init__(self, learnt: list[int], tested: list[int]) -> None:
        super().__init__()
        self.learnt, self.tested = learnt, tested

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        self.tokenizer = self.trainer.lightning_module.tokenizer

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.learnt, "label")

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.tested, "is_right")

    def _loader(self, numbers: list[int], column: str) -> DataLoader:
        return DataLoader([self._batch(number, column) for number in numbers], batch_size=None)

    def _batch(self, number: int, column: str) -> dict[str, Tensor]:
        question, *answers = QUESTIONS[number]
        prompt = self.tokenizer(f"{question}\n")["input_ids"]
        rows = [torch.tensor(prompt + self.tokenizer(answer)["input_ids"]) for answer in answers]
        ids = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : len(prompt)] = -100
        columns = {"group": torch.tensor([number, number]), column: torch.tensor([1, 0])}
        return {"input_ids": ids, "attention_mask": mask, "labels": labels} | columns


class ABQuestions(ChoiceTask):
    """Which of two answers is likelier."""

    measures: ClassVar[dict[str, Measure]] = {
        "accuracy": Measure("Right", "how often the right answer is the likelier", range=(0, 1), written=".2f"),
        "surprise": Measure("Surprise", "nats of the right answer", better=-1, range=(0, None)),
        "spread": Measure("Spread", "of all predictions", columns=("surprise",), function=max),
    }

    def __init__(self, model: str, limit: int = len(QUESTIONS), folds: int = 2) -> None:
        self.model, self.limit, self.folds = model, limit, folds

    def module(self) -> L.LightningModule:
        return CausalLM(self.model)

    def data(self, split: Split, edits: bool = False) -> ABData:
        assert edits, "as a sweep asks"
        outside = [number for number in range(self.limit) if number % split.folds != split.fold]
        if split.inner:
            return ABData(outside[::2], outside[1::2])
        return ABData(outside, [number for number in range(self.limit) if number % split.folds == split.fold])

    def depends_on(self) -> Any:
        return QUESTIONS

    def choice_scores(self, logprobs: Tensor, batch: Mapping[str, Tensor]) -> dict[str, float]:
        right, wrong = logprobs[batch["is_right"] == 1], logprobs[batch["is_right"] == 0]
        return {"accuracy": float(right > wrong), "surprise": -float(right)}
