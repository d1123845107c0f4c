"""The questions of a split that is not a whole fold: inner ones, or fewer to learn from."""

from __future__ import annotations

import random
from typing import Any

from lightning_peft.truthfulqa.datamodule import TruthfulQADataModule
from lightning_peft.truthfulqa.folds import inner_split


class SplitQuestions(TruthfulQADataModule):
    """Questions of which fewer are learnt from, or which are tested on the inner validation questions.

    Args:
        size: learn from so many questions, inner validation questions among them; a smaller size's are among a larger
            one's. None for all.
        inner: learn from the inner training questions, and test on the inner validation questions; no more
            demonstrations are drawn than there are inner training questions.
        **options: as of `TruthfulQADataModule`.
    """

    def __init__(self, size: int | None = None, inner: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.size, self.inner, self._is_split = size, inner, False

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if self._is_split:
            return
        self._is_split = True
        if self.size is not None:
            outside = self.fold_questions
            if not 0 < self.size <= len(outside):
                raise ValueError(f"size must be from 1 to the {len(outside)} training questions, got {self.size}.")
            kept = {question.id for question in random.Random(self.seed).sample(outside, len(outside))[: self.size]}
            learnt = [question for question in outside if question.id in kept]
            self.train_questions, self.val_questions = inner_split(learnt, self.val_fraction, self.seed)
        if self.inner:
            self.val_questions, self.test_questions = [], self.val_questions
            if self.few_shot is not None:
                self.few_shot = min(self.few_shot, len(self.train_questions))
