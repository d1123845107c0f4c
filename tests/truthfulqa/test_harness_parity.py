"""Our log-probabilities and scores are those of lm-evaluation-harness, the real package, on the same questions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_peft.models import CausalLM
from lightning_peft.truthfulqa import ChoiceScorer, Question, TruthfulQADataModule, load_questions
from lightning_peft.truthfulqa.metrics import mc1, mc2

pytestmark = [pytest.mark.usefixtures("all_threads"), pytest.mark.real_model, pytest.mark.slow]


def harness(questions: Sequence[Question], model: Path, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Run the harness's two multiple-choice tasks on local rows: its own YAML files, only the data set replaced."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = []
    for question in questions:
        row: dict[str, Any] = {"question": question.text}
        for metric in ("mc1", "mc2"):
            chosen = [c for c in question.choices if getattr(c, metric) >= 0]
            # the harness takes the first mc1 choice for the true one
            chosen.sort(key=lambda c, m=metric: -getattr(c, m))
            row[f"{metric}_targets"] = {
                "choices": [c.text for c in chosen],
                "labels": [getattr(c, metric) for c in chosen],
            }
        rows.append(row)
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"
    shutil.copy(tasks / "utils.py", folder / "utils.py")
    first, second = ((tasks / f"truthfulqa_mc{i}.yaml").read_text() for i in (1, 2))
    for name, text in (("local_mc1", first), ("local_mc2", second)):
        lines = [
            line
            for line in text.splitlines()
            if not line.startswith(("task:", "dataset_path:", "dataset_name:", "include:", "tag:", "  - truthfulqa"))
        ]
        source = json.dumps({"data_files": {"validation": str(data)}})
        head = [f"task: {name}", "dataset_path: json", f"dataset_kwargs: {source}"]
        if name == "local_mc2":
            head.insert(0, "include: local_mc1.yaml")
        (folder / f"{name}.yaml").write_text("\n".join([*head, *lines]) + "\n")
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=8),
        tasks=["local_mc1", "local_mc2"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    return {name: sorted(samples, key=lambda s: s["doc_id"]) for name, samples in results["samples"].items()}


def ours(questions: Sequence[Question], model: Path) -> list[dict[str, float]]:
    """Log-probability of every choice by its text, scored as `trainer.test` does."""
    module = CausalLM(str(model))
    data = TruthfulQADataModule(source="package", tokenizer=module.tokenizer)
    data.setup()
    data.test_questions = list(questions)
    scorer = ChoiceScorer(module.backbone)
    found = []
    for question, batch in zip(questions, data.test_dataloader(), strict=True):
        scores = scorer.score(batch["input_ids"], batch["attention_mask"], batch["labels"])
        found.append(dict(zip((c.text for c in question.choices), scores.tolist(), strict=True)))
    return found


def compare(questions: Sequence[Question], model: Path, folder: Path) -> None:
    theirs, mine = harness(questions, model, folder), ours(questions, model)
    means: dict[str, list[float]] = {"mc1": [], "mc2": []}
    for number, question in enumerate(questions):
        for metric, task in (("mc1", "local_mc1"), ("mc2", "local_mc2")):
            sample = theirs[task][number]
            assert sample["doc"]["question"] == question.text
            texts = sample["doc"][f"{metric}_targets"]["choices"]
            expected = torch.tensor([float(response[0]) for response in sample["filtered_resps"]])
            scores = torch.tensor([mine[number][text] for text in texts])
            torch.testing.assert_close(scores, expected, atol=1e-3, rtol=0.0)
            truth = torch.tensor(sample["doc"][f"{metric}_targets"]["labels"])
            means[metric].append(mc1(scores, truth, ties="lm_eval") if metric == "mc1" else mc2(scores, truth))
    for metric, task in (("mc1", "local_mc1"), ("mc2", "local_mc2")):
        assert sum(means[metric]) / len(questions) == pytest.approx(
            sum(sample["acc"] for sample in theirs[task]) / len(questions), abs=1e-4
        )


def test_on_the_packages_own_questions(smollm2: Path, tmp_path: Path) -> None:
    compare(load_questions("package")[:8], smollm2, tmp_path)


@pytest.mark.data
def test_on_forty_questions_of_truthfulqa(smollm2: Path, truthfulqa_data: Path, tmp_path: Path) -> None:
    compare(load_questions(truthfulqa_data / "v0")[:40], smollm2, tmp_path)


@pytest.mark.data
def test_the_primer_is_the_benchmarks(truthfulqa_data: Path) -> None:
    import lm_eval

    from lightning_peft.truthfulqa import QA_PRIMER

    task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/truthfulqa/truthfulqa_mc1.yaml").read_text())
    assert QA_PRIMER in task["doc_to_text"]
