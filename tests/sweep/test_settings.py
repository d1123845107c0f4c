"""What cannot be swept is said in one sentence, before a model is loaded wherever that can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from ab_questions import ABData, ABQuestions
from rich.console import Console
from torch import nn

from lightning_peft.cli import main
from lightning_peft.sweep.run import run
from lightning_peft.sweep.settings import Sweep, check, sweep_key
from lightning_peft.tasks import Split, Task
from lightning_peft.truthfulqa.task import TruthfulQA


class Images(Task):
    """A task whose units are no choices."""

    measures = ABQuestions.measures

    def module(self) -> L.LightningModule:
        raise AssertionError("the module is not needed")

    def data(self, split: Split, **row_options: Any) -> L.LightningDataModule:
        raise AssertionError("the data is not needed")


class Unloaded(ABQuestions):
    """A task whose model must not be loaded."""

    def module(self) -> L.LightningModule:
        raise AssertionError("the model was loaded")


class Headless(ABQuestions):
    """A task whose module has no attention."""

    def module(self) -> L.LightningModule:
        module = L.LightningModule()
        module.backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        return module


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alphas": [0.0]}, "at least one number of heads and one strength that is not 0"),
        ({"alphas": [1.0, 1.0]}, "alphas names a value twice"),
        ({"num_heads": [0, 4]}, "num_heads must be at least 1, got 0"),
        ({"direction": "sideways"}, "direction must be one of"),
        ({"positions": "all"}, "each unit's tokens .* positions must lie within 'answer', got 'all'"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1"),
        ({"task": Images()}, "its task must be a ChoiceTask, got Images: derive it from"),
        (
            {"choose": "mc2"},
            r"choose must be a measure that each unit of Unloaded has a score of \(accuracy, surprise\), got 'mc2'",
        ),
        ({"choose": "spread"}, "a score of .* got 'spread'"),
        (
            {"task": TruthfulQA("m"), "choose": "mc4"},
            r"each question of .* \(mc0, mc1, mc2, mc3\), got 'mc4'",
        ),
        ({"task": TruthfulQA("m", num_folds=1)}, "folds must be at least 2"),
    ],
)
def test_what_cannot_be_swept_is_one_sentence(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"name": "x", "task": Unloaded("m"), "num_heads": [4], "alphas": [1.0]}
    plan = Sweep(**(given | {"output": str(tmp_path / "x")} | changes))
    with pytest.raises(ValueError, match=said):
        run(plan, {}, Console(quiet=True))
    assert not (tmp_path / "x").exists()


def test_a_row_option_that_the_task_has_not_is_its_own_sentence() -> None:
    class NoShots(Unloaded):
        def data(self, split: Split, **row_options: Any) -> ABData:
            if "few_shot" in row_options:
                raise ValueError("NoShots has no row option few_shot.")
            return super().data(split, **row_options)

    check(Sweep("x", NoShots("m"), [2], [1.0]))
    with pytest.raises(ValueError, match="NoShots has no row option few_shot"):
        check(Sweep("x", NoShots("m"), [2], [1.0], few_shot=2))


def test_any_measure_of_units_can_be_chosen_by() -> None:
    for choose in (None, "mc0", "mc1", "mc2", "mc3"):
        check(Sweep("x", TruthfulQA("m"), [2], [1.0], choose=choose))


def test_a_module_without_attention_heads_is_one_sentence(tmp_path: Path) -> None:
    plan = Sweep("x", Headless("m"), [2], [1.0], output=str(tmp_path / "x"))
    with pytest.raises(ValueError, match="A sweep moves attention heads, and those of Sequential cannot be found"):
        run(plan, {}, Console(quiet=True))


def test_more_heads_than_the_model_has_is_one_sentence(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    task = ["--task", "ab_questions.ABQuestions", "--task.model", str(tiny_folder("llama"))]
    with pytest.raises(SystemExit, match="num_heads is 999, but the model has 12 heads"):
        main(["sweep", "--name=x", f"--output={tmp_path}/x", "--num_heads=[2,999]", "--alphas=[1.0]", *task])


def test_a_plan_without_a_task_is_one_sentence() -> None:
    with pytest.raises(SystemExit, match=r"^lightning-peft sweep: Sweep needs a task, such as"):
        main(["sweep", "--name=x", "--num_heads=[2]", "--alphas=[1.0]"])


def test_the_key_depends_on_the_task_as_it_is_written_or_as_it_stands() -> None:
    def key(plan: Sweep, task: Any = None, depends_on: Any = "hash") -> str:
        return sweep_key(plan, depends_on, {}, task)

    plan = Sweep("x", ABQuestions("m"), [2], [1.0])
    assert key(plan) == key(Sweep("y", ABQuestions("m"), [2], [1.0], rows=2, chunk=3, choose="surprise"))
    keys = [key(plan), key(plan, {"init_args": 1}), key(plan, {"init_args": 2}), key(plan, depends_on="another")]
    keys += [key(Sweep("x", task, [2], [1.0])) for task in (ABQuestions("m", limit=6), Unloaded("m"), ABQuestions("n"))]
    assert len(set(keys)) == len(keys)
