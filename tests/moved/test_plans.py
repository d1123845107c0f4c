"""A plan of 0.1, with a model and questions on top, means the same task, and says once what it is now."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_peft import moved
from lightning_peft.moved.plans import keep_old_plans
from lightning_peft.tasks import Task
from lightning_peft.truthfulqa import SideEffects
from lightning_peft.truthfulqa.settings import Data
from lightning_peft.truthfulqa.task import TruthfulQA


@keep_old_plans("name", "model", "rows", "data", "seed")
@dataclass
class Planned:
    name: str
    task: Task
    rows: list[int]
    seed: int = 0


@pytest.fixture(autouse=True)
def nothing_was_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moved, "_WARNED", set())


OLD = {
    "keywords": lambda: Planned(name="x", model="m", rows=[1], data=Data("hub", limit=7), dtype="bfloat16", seed=3),
    "positions": lambda: Planned("x", "m", [1], Data("hub", limit=7), 3, dtype="bfloat16"),
}


@pytest.mark.parametrize("given", OLD)
def test_a_model_and_questions_are_a_task(given: str) -> None:
    with pytest.warns(FutureWarning, match=r"Planned\(model=…, data=…, dtype=…\) is now Planned\(task=TruthfulQA"):
        plan = OLD[given]()
    task = plan.task
    assert isinstance(task, TruthfulQA)
    assert (task.model, task.source, task.limit, task.dtype) == ("m", "hub", 7, "bfloat16")
    assert (plan.name, plan.rows, plan.seed) == ("x", [1], 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        OLD[given]()
        assert Planned("x", task, [1]).task is task


def parsed(*args: str) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Planned, as_positional=False)
    values = parser.instantiate(parser.parse_args(list(args))).as_dict()
    values.pop("config")
    return Planned(**values)


@pytest.mark.filterwarnings("ignore:.*is now")
def test_yaml_of_either_kind_is_read(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("{name: x, rows: [1], model: m, data: {limit: 4, side_effects: {tokens: 0}}}")
    old = parsed("--config", str(tmp_path / "old.yaml"), "--data.source", "hub").task
    args = "{model: m, limit: 4, side_effects: {tokens: 0}}"
    task = f"{{class_path: lightning_peft.truthfulqa.task.TruthfulQA, init_args: {args}}}"
    (tmp_path / "new.yaml").write_text(f"{{name: x, rows: [1], task: {task}}}")
    new = parsed("--config", str(tmp_path / "new.yaml"), "--task.source", "hub").task
    assert vars(old) == vars(new) and new.side_effects == SideEffects(tokens=0)


def test_what_belongs_to_no_plan_is_one_sentence() -> None:
    task = TruthfulQA("m")
    with pytest.raises(ValueError, match=r"^A plan has a task or, as in 0\.1, model: give all of it to the task\.$"):
        Planned("x", task=task, rows=[1], model="m")
    with pytest.raises(ValueError, match=r"^A plan has a task or, as in 0\.1, dtype: "):
        Planned("x", task, [1], dtype="float16")
    with pytest.raises(ValueError, match=r"^A plan without a task needs a model beside data\.$"):
        Planned("x", rows=[1], data=Data())
    with pytest.raises(ValueError, match=r"^A plan needs a task, what it measures on: task: "):
        Planned("x", rows=[1])
