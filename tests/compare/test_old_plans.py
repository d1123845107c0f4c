"""Plans of the last release, a model and its questions at the top, mean the benchmark's task, with one warning."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_peft import moved
from lightning_peft.cli import main
from lightning_peft.compare import run as running
from lightning_peft.compare.plan import Plan, Row, cell_key
from lightning_peft.tasks.decoding import DoLaScoring
from lightning_peft.truthfulqa import SideEffects
from lightning_peft.truthfulqa.settings import Data
from lightning_peft.truthfulqa.task import TruthfulQA

ROWS = [Row("base", "Base", "base")]
TASK = {"class_path": "TruthfulQA", "init_args": {"model": "m"}}
EFFECTS = {"tokens": 0, "capability": 0}


@pytest.fixture(autouse=True)
def nobody_was_warned() -> Iterator[None]:
    before = set(moved._WARNED)
    moved._WARNED.clear()
    yield
    moved._WARNED.update(before)


def arguments(plan: Plan) -> dict[str, Any]:
    assert isinstance(plan.task, TruthfulQA)
    return vars(plan.task) | {"_made_with": None}


def test_a_model_and_data_are_the_task_with_one_warning() -> None:
    new = Plan("x", ROWS, TruthfulQA("m", "hub", limit=7, dtype="bfloat16"), output="out", seed=3)
    data = Data("hub", limit=7)
    with pytest.warns(FutureWarning, match=r"^Plan\(model=.*is now Plan\(task=TruthfulQA"):
        old = Plan(name="x", model="m", rows=ROWS, data=data, dtype="bfloat16", output="out", seed=3)
    assert arguments(old) == arguments(new) and (old.output, old.seed) == ("out", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_place = Plan("x", "m", ROWS, data, "out", 3, "bfloat16", "cpu")
    assert arguments(by_place) == arguments(new) and by_place.accelerator == "cpu"
    assert arguments(Plan("x", "m", ROWS)) == arguments(Plan("x", ROWS, TruthfulQA("m")))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_both_forms_and_neither_are_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"^A plan has a task or, as in 0\.1, model and data"):
        Plan("x", ROWS, TruthfulQA("m"), model="m", data=Data())
    with pytest.raises(ValueError, match=r"^A plan without a task needs a model beside data"):
        Plan("x", rows=ROWS, data=Data())
    with pytest.raises(ValueError, match=r"^A plan needs a task"):
        Plan("x", ROWS)


@pytest.mark.parametrize(
    ("written", "options"),
    [
        ({"model": "m", "data": {"source": "hub", "side_effects": EFFECTS}, "dtype": "float64"}, []),
        ({"model": "m", "data": {"side_effects": EFFECTS}}, ["--data.source=hub", "--dtype", "float64"]),
        ({"model": "n"}, ["--model=m", "--data.source", "hub", "--dtype=float64", "--data.side_effects", str(EFFECTS)]),
        (
            {"task": {"class_path": "TruthfulQA", "init_args": {"model": "m"}}},
            ["--data.source", "hub", "--dtype=float64"],
        ),
        ({"task": {"class_path": "TruthfulQA", "init_args": {"model": "m"}}}, ["--task.source=hub"]),
        ({"task": "TruthfulQA"}, ["--task.model=m", "--task.source=hub"]),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_yaml_and_command_line_take_the_old_form_and_the_new(
    written: dict[str, Any], options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Plan] = []

    def run(plan: Plan, *_: Any) -> None:
        seen.append(plan)
        raise ValueError("seen")

    monkeypatch.setattr(running, "run", run)
    rows = [{"name": "base", "label": "Base", "kind": "base"}]
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "rows": rows, "output": str(tmp_path / "out"), **written}))
    with pytest.raises(SystemExit, match="seen"):
        main(["compare", "--config", str(path), *options])
    task: Any = seen[0].task
    assert (task.model, task.source) == ("m", "hub")
    assert task.dtype == ("float32" if any("--task" in option for option in options) else "float64")
    given = "'tokens': 0" in str([written, options])
    assert task.side_effects == (SideEffects(**EFFECTS) if given else SideEffects())


def test_a_cell_s_key_is_that_of_either_form() -> None:
    row = {"name": "base", "kind": "base", "batch_size": None, "few_shot": None}
    plan = Plan("x", ROWS, TruthfulQA("m", limit=12))
    key = cell_key(plan, {"rows": {"base": row}}, ROWS[0], 0)
    assert key == cell_key(plan, {"rows": {"base": row | {"batch_size": 16}}}, ROWS[0], 0)
    assert key != cell_key(plan, {"rows": {"base": row | {"batch_size": 8}}}, ROWS[0], 0)
    keys = set()
    for module in ("lightning_peft.tasks.decoding", "lightning_peft.compare.scoring"):
        scoring = {"class_path": f"{module}.{DoLaScoring.__name__}", "init_args": {"layers": "high"}}
        keys.add(cell_key(plan, {"rows": {"base": row | {"scoring": scoring}}}, ROWS[0], 0))
    assert len(keys) == 1


def test_a_plan_made_in_python_is_described_the_same_in_every_process() -> None:
    plans = [
        Plan("x", [*ROWS, Row("dola", "DoLa", "decoded", scoring=DoLaScoring("low"))], TruthfulQA("m")) for _ in "ab"
    ]
    first, second = (json.dumps(running.settings_of(plan)) for plan in plans)
    assert first == second and "0x" not in first and '"layers": "low"' in first
