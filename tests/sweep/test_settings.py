"""What cannot be swept is said in one sentence, before a model is loaded wherever that can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from ab_questions import ABQuestions
from rich.console import Console
from torch import nn

from lightning_peft.cli import main
from lightning_peft.sweep.run import run
from lightning_peft.sweep.settings import Sweep, check, data_options, sweep_key
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


def test_data_is_given_what_it_takes() -> None:
    assert data_options(Sweep("x", TruthfulQA("m"), [2], [1.0], few_shot=0)) == {
        "edits": True,
        "units_per_batch": 1,
        "few_shot": 0,
    }
    assert data_options(Sweep("x", ABQuestions("m"), [2], [1.0])) == {"edits": True}
    with pytest.raises(ValueError, match=r"few_shot is 2, but Unloaded\.data takes none"):
        check(Sweep("x", Unloaded("m"), [2], [1.0], few_shot=2))


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
    with pytest.raises(SystemExit, match=r"^lightning-peft sweep: A plan needs a task, what it measures on"):
        main(["sweep", "--name=x", "--num_heads=[2]", "--alphas=[1.0]"])


def test_the_key_depends_on_the_task_and_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Sweep("x", ABQuestions("m"), [2], [1.0])
    key = sweep_key(plan, {})
    assert key == sweep_key(Sweep("y", ABQuestions("m", 12), [2], [1.0], rows=2, chunk=3, choose="surprise"), {})
    others = [ABQuestions("m", limit=6), ABQuestions("n"), Unloaded("m")]
    keys = [key, *(sweep_key(Sweep("x", task, [2], [1.0]), {}) for task in others)]
    monkeypatch.setattr(ABQuestions, "depends_on", lambda task: "other questions")
    keys.append(sweep_key(plan, {}))
    assert len(set(keys)) == len(keys)
