"""Free answers in a comparison: each row's own, against references and judges, each written and judged once."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from lightning_peft.callbacks import ITI, LoRA
from lightning_peft.compare.cell import cell_of
from lightning_peft.compare.measured import measured_table
from lightning_peft.compare.page import write_html
from lightning_peft.compare.plan import Plan, Row, check
from lightning_peft.compare.run import run
from lightning_peft.compare.sections import section_views
from lightning_peft.models import CausalLM
from lightning_peft.sweep.settings import Sweep
from lightning_peft.sweep.settings import check as check_sweep
from lightning_peft.tasks import Cell
from lightning_peft.tasks.decoding import DoLaScoring
from lightning_peft.truthfulqa import SideEffects, answers_section
from lightning_peft.truthfulqa.answers import Answers
from lightning_peft.truthfulqa.judges import Confusion, JudgeQuality, save_quality
from lightning_peft.truthfulqa.references import reference_scores
from lightning_peft.truthfulqa.settings import Data
from lightning_peft.truthfulqa.task import TruthfulQA

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = ["base", "zero", "few", "iti", "lora", "both"]


class Judge:
    """Calls an answer true, or informative, by the number of its letters; counts how often it is asked and loaded."""

    asked, loaded = 0, 0

    def __init__(self, kind: str) -> None:
        self.kind, self.model = kind, nn.Linear(1, 1)

    @classmethod
    def from_adapter(cls, folder: Path, kind: str, base: str | None, batch_size: int) -> Judge:
        cls.loaded += 1
        return cls(kind)

    def score(self, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        Judge.asked += 1
        return torch.tensor([(len(answer) % (2 if self.kind == "truth" else 3)) / 2 for answer in answers])


def judge_folder(folder: Path, kind: str, accuracy: float = 0.8) -> str:
    peft.LoraConfig(r=2, base_model_name_or_path="base").save_pretrained(str(folder))
    confusion = Confusion(((8, 1, 9, 2),) * 50)
    save_quality(JudgeQuality(kind, 1000, 50, accuracy, 0.6, 0.75, 0.1, 0.2, confusion), folder)
    return str(folder)


@pytest.fixture(scope="module")
def made(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A plan that has been run, in two steps: without answers, then with."""
    folder = tmp_path_factory.mktemp("answers")
    iti = ITI(num_heads=3, alpha=5.0)
    rows = [
        Row("base", "Base", "base"),
        Row("zero", "Zero-shot", "prompt", few_shot=0),
        Row("few", "Few-shot", "prompt", few_shot=3, draws=2),
        Row("iti", "ITI", "edited", iti),
        Row("lora", "LoRA", "tuned", LoRA(r=2), learning_rates=[0.05], max_epochs=1),
        Row("both", "LoRA + ITI", "stack", iti, after="lora"),
        Row("dola", "DoLa", "decoded", scoring=DoLaScoring()),
    ]
    effects = SideEffects(tokens=0, capability=0)
    task = TruthfulQA(str(tiny_folder("llama")), "package", limit=12, side_effects=effects)
    plan = Plan("x", rows, task, output=str(folder / "run"), accelerator="cpu")
    settings = {"rows": {row.name: {"name": row.name} for row in rows}}
    before = run(plan, settings, Console(file=io.StringIO()))
    cells = {path: path.stat().st_mtime_ns for path in folder.glob("run/cells/*/result.json")}
    judges = {kind: judge_folder(folder / kind, kind, 0.8 if kind == "truth" else 0.5) for kind in ("truth", "info")}
    task.answers = Answers(max_new_tokens=12, truth_judge=judges["truth"], info_judge=judges["info"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers_section, "LanguageModelJudge", Judge)
        after = run(plan, settings, Console(file=io.StringIO()))
    calls = Judge.loaded, Judge.asked
    written = [json.loads(line) for line in (folder / "run" / "answers.jsonl").read_text().splitlines()]
    found = {"before": before, "after": after, "cells": cells, "written": written, "calls": calls}
    return {"plan": plan, "task": task, "settings": settings} | found


def rows_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in results["rows"]}


def test_answers_are_added_to_a_finished_comparison(made: dict[str, Any]) -> None:
    assert all(path.stat().st_mtime_ns == written for path, written in made["cells"].items())
    before, after = rows_of(made["before"]), rows_of(made["after"])
    assert made["before"]["answers"] is None and all(not row["rates"] for row in before.values())
    for name, row in after.items():
        assert row["metrics"]["mc2"] == before[name]["metrics"]["mc2"]
        assert ("true_info" in row["metrics"]) == (name in ROWS)


def test_every_row_answers_every_question_once(made: dict[str, Any]) -> None:
    places = [(answer["method"], answer["question_id"]) for answer in made["written"]]
    assert len(places) == len(set(places)) == len(ROWS) * 12
    texts = {name: tuple(a["raw"] for a in made["written"] if a["method"] == name) for name in ROWS}
    assert len(set(texts.values())) >= 5, "a tiny model says little, but not the same to every prompt and adapter"


@pytest.mark.parametrize("name", ["few", "iti", "both"])
def test_the_answers_are_those_of_the_row_s_model_and_prompt(name: str, made: dict[str, Any]) -> None:
    from lightning_peft import load_adapter

    plan, task = made["plan"], made["task"]
    row = next(row for row in plan.rows if row.name == name)
    folder = Path(plan.output) / "cells" / f"{name}-fold1"
    cell = cell_of(plan, row, 1, folder)
    module, data = CausalLM(task.model), task.data(cell.split, **cell.options_of(0))
    if row.callback is not None:
        load_adapter(module.backbone, folder / "adapter")
    data.prompting = task.answers.prompting(None)
    batches: Any = cell.trainer([]).predict(module, datamodule=data)
    expected = {answer.question_id: answer.text for batch in batches for answer in batch}
    questions = {question.id: question for question in data.test_questions}
    found = [a for a in made["written"] if a["method"] == name and a["fold"] == 1]
    assert {a["question_id"]: a["answer"] for a in found} == expected
    for answer in found:
        scores = reference_scores(answer["answer"], questions[answer["question_id"]])
        assert (answer["bleu_acc"], answer["rouge1_acc"]) == (scores["bleu_acc"], scores["rouge1_acc"])


def test_shares_are_means_over_questions_and_differences_are_paired(made: dict[str, Any]) -> None:
    rows, shares = rows_of(made["after"]), {}
    for name in ROWS:
        answers = [a for a in made["written"] if a["method"] == name]
        both = [a["truth"] >= 0.5 and a["info"] >= 0.5 for a in answers]
        shares[name] = sum(both) / 12
        assert rows[name]["metrics"]["true_info"]["mean"] == pytest.approx(shares[name])
        assert rows[name]["rates"]["true_info"]["judged"] == pytest.approx(shares[name])
        rates = rows[name]["rates"]
        product = rates["true"]["judged"] * rates["info"]["judged"]
        assert rates["product_of_means"]["judged"] == pytest.approx(product)
    for name in ROWS[1:]:
        assert rows[name]["difference"]["true_info"]["mean"] == pytest.approx(shares[name] - shares["base"])


def test_a_judge_is_loaded_once_and_nothing_is_judged_or_written_twice(
    made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made["calls"] == (2, 2 * 2 * len(ROWS))
    monkeypatch.setattr(answers_section, "LanguageModelJudge", None)
    monkeypatch.setattr(answers_section, "_write", pytest.fail)
    again = run(made["plan"], made["settings"], Console(file=io.StringIO()))
    assert again == made["after"]


def test_a_row_that_cannot_answer_is_left_out_and_stops_no_other(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, console = answers_section._write, Console(file=io.StringIO(), width=200)

    def fails(task: TruthfulQA, options: Answers, cell: Cell, *rest: Any) -> list[dict[str, Any]]:
        if cell.row == "iti":
            raise RuntimeError("no answer")
        return write(task, options, cell, *rest)

    monkeypatch.setattr(answers_section, "_write", fails)
    monkeypatch.setattr(answers_section, "LanguageModelJudge", Judge)
    plan: Plan = made["plan"]
    monkeypatch.setattr(made["task"].answers, "max_new_tokens", 2)
    shutil.copytree(plan.output or "", tmp_path / "run")
    monkeypatch.setattr(plan, "output", str(tmp_path / "run"))
    rows = rows_of(run(plan, made["settings"], console))
    assert {name for name, row in rows.items() if "true" in row["metrics"]} == set(ROWS) - {"iti"}
    assert "failed: RuntimeError: no answer" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_judge_that_cannot_be_loaded_leaves_the_rest(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(folder: Path, kind: str, base: str | None, batch_size: int) -> Judge:
        raise OSError("no such base")

    plan, console = made["plan"], Console(file=io.StringIO(), width=200)
    shutil.copytree(plan.output, tmp_path / "run")
    for verdicts in (tmp_path / "run").glob("cells/*/judged-info.json"):
        verdicts.unlink()
    monkeypatch.setattr(plan, "output", str(tmp_path / "run"))
    monkeypatch.setattr(answers_section, "LanguageModelJudge", SimpleNamespace(from_adapter=fails))
    rows = rows_of(run(plan, made["settings"], console))
    assert "The info judge failed: OSError: no such base" in console.file.getvalue()
    assert all("bleu_acc" in rows[name]["metrics"] and "true_info" not in rows[name]["metrics"] for name in ROWS)


def test_terminal_and_page_show_shares_corrections_and_the_judges(made: dict[str, Any], tmp_path: Path) -> None:
    (view,) = section_views(made["after"])
    assert [column["label"] for column in view["columns"]][2:] == ["True", "Info", "True*Info"]
    console = Console(file=io.StringIO(), width=160)
    console.print(measured_table(view))
    page = write_html(made["after"], tmp_path / "report.html").read_text(encoding="utf-8")
    for shown in (console.file.getvalue(), page):  # type: ignore[attr-defined]
        for words in ("Free answers", "corrected", "accuracy 0.800, AUROC 0.750", "Without answers: DoLa."):
            assert words in shown
        assert shown.count("no better than that") == 1  # the info judge
    assert section_views(made["before"]) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"preset": "none"}, "preset must be one of"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"batch_size": 0}, "batch_size of the answers must be at least 1"),
        ({"truth_judge": "x"}, "Name both a truth_judge and an info_judge, or neither"),
        ({"truth_judge": "nowhere", "info_judge": "info"}, "truth_judge is nowhere, which holds no adapter_config"),
        ({"truth_judge": "info", "info_judge": "info"}, "is of a judge of info"),
        ({"truth_judge": "bare", "info_judge": "info"}, "judge.json does not exist"),
        ({"truth_judge": "nameless", "info_judge": "info"}, "does not name its base model: set judge_base"),
    ],
)
def test_answers_that_cannot_be_had_are_refused_before_anything_runs(
    change: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    judge_folder(tmp_path / "info", "info")
    peft.LoraConfig(r=2, base_model_name_or_path="base").save_pretrained("bare")
    peft.LoraConfig(r=2).save_pretrained("nameless")
    with pytest.raises(ValueError, match=sentence):
        check(Plan("x", [Row("base", "", "base")], TruthfulQA("m", "package", answers=Answers(**change))))


def test_a_sweep_writes_no_answers() -> None:
    with pytest.raises(ValueError, match="A sweep scores choices and writes no answers"):
        check_sweep(Sweep("x", "m", [3], [5.0], Data("package", answers=Answers())))


def test_demonstrations_stand_in_the_six_questions_of_qa_only() -> None:
    rows = [Row("base", "", "base"), Row("few", "", "prompt", few_shot=5)]
    with pytest.raises(ValueError, match="Row 'few' has few_shot, which goes with answers of the preset 'qa'"):
        check(Plan("x", rows, TruthfulQA("m", "package", answers=Answers("null"))))
