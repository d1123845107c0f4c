"""Our log-probabilities and scores are those of lm-evaluation-harness, the real package, on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.lm_eval_side import METRICS, Harness
from lightning_peft.models import CausalLM
from lightning_peft.truthfulqa import ChoiceScorer, Question, TruthfulQADataModule, load_questions
from lightning_peft.truthfulqa.metrics import mc1, mc2

pytestmark = [pytest.mark.usefixtures("all_threads"), pytest.mark.real_model, pytest.mark.slow]


def ours(questions: Sequence[Question], model: Path) -> list[dict[str, float]]:
    """Log-probability of every choice by its text, scored as `trainer.test` does."""
    module = CausalLM(str(model))
    data = TruthfulQADataModule(source="package", tokenizer=module.tokenizer)
    data.setup()
    data.test_questions = list(questions)
    scorer, found = ChoiceScorer(module.backbone), []
    for batch in data.test_dataloader():
        found += scorer.score(batch["input_ids"], batch["attention_mask"], batch["labels"]).tolist()
    scores = iter(found)
    return [{choice.text: next(scores) for choice in question.choices} for question in questions]


def compare(questions: Sequence[Question], model: Path) -> None:
    theirs, mine = Harness(model)(questions), ours(questions, model)
    means: dict[str, list[float]] = {"mc1": [], "mc2": []}
    for number, question in enumerate(questions):
        for metric in METRICS:
            sample = theirs[metric][number]
            assert sample["doc"]["question"] == question.text
            texts = sample["doc"][f"{metric}_targets"]["choices"]
            expected = torch.tensor([float(response[0]) for response in sample["filtered_resps"]])
            scores = torch.tensor([mine[number][text] for text in texts])
            torch.testing.assert_close(scores, expected, atol=1e-3, rtol=0.0)
            truth = torch.tensor(sample["doc"][f"{metric}_targets"]["labels"])
            means[metric].append(mc1(scores, truth, ties="lm_eval") if metric == "mc1" else mc2(scores, truth))
    for metric in METRICS:
        assert sum(means[metric]) / len(questions) == pytest.approx(
            sum(sample["acc"] for sample in theirs[metric]) / len(questions), abs=1e-4
        )


def test_on_the_packages_own_questions(smollm2: Path) -> None:
    compare(load_questions("package")[:8], smollm2)


@pytest.mark.data
def test_on_questions_of_truthfulqa(smollm2: Path, truthfulqa_data: Path) -> None:
    compare(load_questions(truthfulqa_data / "v0")[:12], smollm2)


def test_on_gemma_whose_layers_see_a_window(gemma3_folder: Path) -> None:
    compare(load_questions("package")[:1], gemma3_folder)


@pytest.mark.data
def test_the_primer_is_the_benchmarks(truthfulqa_data: Path) -> None:
    import lm_eval

    from lightning_peft.truthfulqa import QA_PRIMER

    task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/truthfulqa/truthfulqa_mc1.yaml").read_text())
    assert QA_PRIMER in task["doc_to_text"]
