"""An edit's strength is chosen on questions that neither the edit nor the test has seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_peft.callbacks import CAA, ITI, LoRA
from lightning_peft.compare import cell
from lightning_peft.compare.plan import Plan, Row, check
from lightning_peft.models import CausalLM
from lightning_peft.truthfulqa import ChoiceScorer, TruthfulQADataModule, load_questions
from lightning_peft.truthfulqa.folds import assign_folds, inner_split
from lightning_peft.truthfulqa.metrics import mc2
from lightning_peft.truthfulqa.questions import subset
from lightning_peft.truthfulqa.task import TruthfulQA

pytestmark = pytest.mark.filterwarnings("ignore")
ALPHAS = [0.0, 3.0, 40.0]


@pytest.fixture
def plan(tiny_folder: Callable[[str], Path]) -> Plan:
    rows = [Row("base", "", "base"), Row("iti", "", "edited", ITI(num_heads=3), alphas=ALPHAS)]
    made = Plan("choice", rows, TruthfulQA(str(tiny_folder("llama")), "package", limit=24), accelerator="cpu")
    check(made)
    return made


def by_hand(model: str, alpha: float, learnt: list[Any], asked: list[Any]) -> float:
    """Mean MC2 on some questions of the edit that others give."""
    module = CausalLM(model)
    data = TruthfulQADataModule("package", "statements", tokenizer=module.tokenizer, questions_per_batch=1)
    data.train_questions, data.test_questions = learnt, asked
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[ITI(3, alpha)]
    )
    trainer.fit(module, data)
    scorer = ChoiceScorer(module.eval().backbone)
    scores = [
        (scorer.score(b["input_ids"], b["attention_mask"], b["labels"]), b["mc2"]) for b in data.test_dataloader()
    ]
    return sum(mc2(*pair) for pair in scores) / len(scores)


def test_each_strength_is_measured_on_the_inner_validation_questions(plan: Plan, tmp_path: Path) -> None:
    chosen = cell.run_cell(plan, plan.rows[1], 0, tmp_path, {})["chosen"]
    questions = subset(load_questions("package"), 24)
    outside = [q for q, fold in zip(questions, assign_folds(questions, 2, 0), strict=True) if fold != 0]
    task: Any = plan.task
    learnt, asked = inner_split(outside, task.val_fraction, 0)
    for trial in chosen["trials"]:
        assert trial["val_mc2"] == pytest.approx(by_hand(task.model, trial["alpha"], learnt, asked), abs=1e-5)
    best = max(chosen["trials"], key=lambda trial: trial["val_mc2"])
    assert chosen["alpha"] == best["alpha"]


def test_the_result_is_the_edit_of_all_training_questions_at_the_chosen_strength(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"alpha": 3.0, "trials": []}
    monkeypatch.setattr(cell, "_choose_alpha", lambda *_: chosen)
    found = cell.run_cell(plan, plan.rows[1], 0, tmp_path / "chosen", {})
    plain = Row("iti", "", "edited", ITI(num_heads=3, alpha=3.0))
    expected = cell.run_cell(plan, plain, 0, tmp_path / "plain", {})
    assert found["chosen"] == chosen
    assert [s["logprob"] for s in found["samples"]] == [s["logprob"] for s in expected["samples"]]
    settings = json.loads(next((tmp_path / "chosen").rglob("adapter_config.json")).read_text())
    assert settings["alpha"] == 3.0


def test_of_strengths_that_are_equally_good_the_smallest_is_taken(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChoiceScorer, "score", lambda self, ids, *_: torch.zeros(len(ids)))
    row = Row("caa", "", "edited", CAA(), alphas=[-4.0, 2.0, 9.0])
    assert cell._choose_alpha(plan, row, cell.cell_of(plan, row, 0, tmp_path), {})["alpha"] == 2.0


def test_only_edits_have_strengths_to_choose_from() -> None:
    rows = [Row("base", "", "base"), Row("lora", "", "tuned", LoRA(), learning_rates=[1e-3], alphas=[1.0])]
    with pytest.raises(ValueError, match=r"^Row 'lora' has alphas to choose from, but is no edit with a strength"):
        check(Plan("wrong", rows, TruthfulQA("")))
