"""What strengths are chosen on: the inner training questions learnt from, the inner validation questions tested."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_peft.tasks import Split
from lightning_peft.truthfulqa.task import TruthfulQA


@pytest.fixture
def splits(tiny_tokenizer: Any) -> tuple[Any, Any]:
    """The data of a fold, and the inner data outside it, set up."""
    task = TruthfulQA("no-model", limit=20, val_fraction=0.5)
    both = [task.data(Split(1, inner=inner), edits=True, few_shot=2, units_per_batch=1) for inner in (False, True)]
    for data in both:
        data.tokenizer = tiny_tokenizer
        data.setup("fit")
        data.setup("test")
    return both[0], both[1]


def test_the_inner_data_is_learnt_from_and_tested_on_outside_the_fold(splits: tuple[Any, Any]) -> None:
    outer, inner = splits
    assert inner.fold_questions == inner.train_questions == outer.train_questions
    assert inner.test_questions == outer.val_questions and len(inner.test_questions) == 5
    assert not {q.id for q in inner.test_questions} & {q.id for q in outer.test_questions}


def test_its_demonstrations_are_of_inner_training_questions(splits: tuple[Any, Any]) -> None:
    _, inner = splits
    shown = {question.text for question in inner.train_questions}
    for context in inner.test_contexts().values():
        *shots, _ = context.split("\n\n")
        assert len(shots) == 2
        assert all(any(text in shot for text in shown) for shot in shots)
