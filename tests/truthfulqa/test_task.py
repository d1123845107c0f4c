"""The benchmark as a task: its splits, its scores, the choice of a strength by its primary measure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_peft.callbacks import ITI
from lightning_peft.compare import cell as cells
from lightning_peft.compare.plan import Plan, Row, check
from lightning_peft.models import CausalLM
from lightning_peft.tasks import ChoiceTask, Measure, Split
from lightning_peft.truthfulqa.metrics import mc2
from lightning_peft.truthfulqa.task import MEASURES, TruthfulQA

pytestmark = pytest.mark.filterwarnings("ignore")


def ids(questions: list[Any]) -> set[int]:
    return {question.id for question in questions}


@pytest.fixture
def task(tiny_folder: Callable[[str], Path]) -> TruthfulQA:
    return TruthfulQA(str(tiny_folder("llama")), limit=24)


def set_up(task: TruthfulQA, split: Split, tokenizer: Any, **options: Any) -> Any:
    data = task.data(split, **options)
    data.tokenizer = tokenizer
    data.setup()
    data.setup()  # as a fit and a test do
    return data


def test_inner_units_are_learnt_from_and_tested_outside_the_fold(task: TruthfulQA, tiny_tokenizer: Any) -> None:
    assert isinstance(task, ChoiceTask)
    whole = set_up(task, Split(1), tiny_tokenizer)
    inner = set_up(task, Split(1, inner=True), tiny_tokenizer, few_shot=100)
    assert ids(inner.train_questions) == ids(whole.train_questions) and inner.val_questions == []
    assert ids(inner.test_questions) == ids(whole.val_questions) and not ids(inner.test_questions) & ids(
        whole.test_questions
    )
    assert inner.few_shot == len(inner.train_questions)


def test_a_smaller_size_is_among_a_larger_one_s(task: TruthfulQA, tiny_tokenizer: Any) -> None:
    whole = set_up(task, Split(), tiny_tokenizer)
    six, eleven = (set_up(task, Split(size=size), tiny_tokenizer) for size in (6, 11))
    assert len(six.fold_questions) == 6 and ids(six.fold_questions) < ids(eleven.fold_questions)
    assert ids(eleven.fold_questions) < ids(whole.fold_questions)
    assert ids(six.test_questions) == ids(whole.test_questions)
    with pytest.raises(ValueError, match="size must be from 1 to the 12 training questions, got 13"):
        set_up(task, Split(size=13), tiny_tokenizer)


def test_scores_are_those_of_each_question_s_choices(task: TruthfulQA) -> None:
    module, scores = CausalLM(task.model), task.scores()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = L.Trainer(callbacks=[scores], **options)
    ((logged),) = trainer.test(module, task.data(Split(0)), verbose=False)
    assert set(scores.columns) == set(task.measures) and len(scores.columns["mc2"]) == 12
    question = scores.choices[0]["question_id"]
    mine = [choice for choice in scores.choices if choice["question_id"] == question]
    logprobs, truth = (torch.tensor([choice[name] for choice in mine]) for name in ("logprob", "mc2"))
    assert scores.columns["mc2"][question] == pytest.approx(mc2(logprobs, truth))
    assert task.records.value("mc2", scores.columns) == logged["mc2"]


class Untrue(TruthfulQA):
    """The same, but less MC2 is better."""

    measures = {**MEASURES, "mc2": Measure("MC2", "", -1)}  # noqa: RUF012


def test_a_strength_is_chosen_by_what_is_better(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    chosen = {}
    for kind in (TruthfulQA, Untrue):
        rows = [Row("base", "", "base"), Row("iti", "", "edited", ITI(num_heads=3), alphas=[0.0, 3.0, 40.0])]
        plan = Plan("x", rows, kind(str(tiny_folder("llama")), limit=24), accelerator="cpu")
        check(plan)
        found = cells._choose_alpha(plan, rows[1], cells.cell_of(plan, rows[1], 0, tmp_path), {})
        values = {trial["alpha"]: trial["val_mc2"] for trial in found["trials"]}
        best = (max if kind is TruthfulQA else min)(values.values())
        assert values[found["alpha"]] == best
        chosen[kind] = found["alpha"]
    assert chosen[TruthfulQA] != chosen[Untrue]
