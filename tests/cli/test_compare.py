"""`lightning-peft compare` on a task of one's own: a plan that cannot be read, and a comparison that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_peft.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")

TASK = """
import lightning as L
from digits import Digits, DigitTask
from lightning_peft.tasks import Task


class NoTask:
    pass


class Abstract(Task):
    def module(self):
        return None


class Sized(DigitTask):
    def __init__(self, size: int, folder: str = "images"):
        if size == 1:
            raise ValueError("1 is not a size.")
        if size == 2:
            raise KeyError("size")
        if size == 3:
            open("no-such-file")


class Fails(L.Callback):
    def on_fit_start(self, trainer, pl_module):
        raise RuntimeError("no training here")
"""
BASE = {"name": "base", "label": "Base", "kind": "base"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "task_of_mine.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "task_of_mine", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compare(task: Any, *rows: dict[str, Any], **options: Any) -> str:
    """Return the message with which the command ends."""
    plan = {"name": "mine", "task": task, "rows": list(rows or (BASE,)), "accelerator": "cpu", **options}
    Path("plan.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(SystemExit) as caught:
        main(["compare", "--config", "plan.yaml"])
    return str(caught.value)


def sized(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "task_of_mine.Sized", "init_args": arguments}


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ({"class_path": "no_such_module.Task"}, "task: no_such_module.Task: No module named 'no_such_module'"),
        ({"class_path": "task_of_mine.Msising"}, "task: task_of_mine.Msising: module 'task_of_mine' has no attribute"),
        ({"class_path": "task_of_mine.NoTask"}, "task: Import path task_of_mine.NoTask does not correspond to a subcl"),
        ({"class_path": "task_of_mine.Abstract"}, "task: Expected an instantiatable class, but task_of_mine.Abstract "),
        (sized(), "task: task_of_mine.Sized: the following arguments are required: size"),
        (sized(size="a"), "task: task_of_mine.Sized: size: Expected a <class 'int'>. Got value: a"),
        (sized(size=5, colour=2), "task: task_of_mine.Sized: Option 'colour' is not accepted"),
        (sized(size=1), "1 is not a size."),
        (sized(size=2), "KeyError: 'size'"),
        (sized(size=3), "no-such-file does not exist."),
        ("NoSuchTask", "task: Expected a dot import path string: NoSuchTask"),
    ],
)
def test_a_task_that_cannot_be_made_is_the_line_that_matters(task: Any, sentence: str) -> None:
    message = compare(task)
    assert message.startswith(f"lightning-peft compare: {sentence}") and "\n" not in message


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"kind": "bas"}, "rows: lightning_peft.compare.plan.Row: kind: Expected a typing.Literal['base', "),
        ({"colour": 3}, "rows: lightning_peft.compare.plan.Row: Option 'colour' is not accepted"),
        (
            {"callback": {"class_path": "lightning_peft.callbacks.LoRA", "init_args": {"rr": 8}}},
            "rows: lightning_peft.compare.plan.Row: callback: lightning_peft.callbacks.LoRA: Option 'rr' is",
        ),
    ],
)
def test_a_row_that_cannot_be_made_is_the_line_that_matters(row: dict[str, Any], sentence: str) -> None:
    message = compare(sized(size=5), {**BASE, **row})
    assert message.startswith(f"lightning-peft compare: {sentence}") and "\n" not in message


def test_where_every_row_fails_the_command_does_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    fails = {"callback": {"class_path": "task_of_mine.Fails"}, "learning_rates": [0.1]}
    message = compare({"class_path": "digits.DigitTask"}, {**BASE, **fails})
    assert message == "lightning-peft compare: every row has failed, each as the table says."
    printed = capsys.readouterr().out
    assert printed.count("failed: RuntimeError: no training here") >= 2 and Path("runs/mine/report.html").exists()
    assert json.loads(Path("runs/mine/results.json").read_text())["rows"][0]["failed"]
