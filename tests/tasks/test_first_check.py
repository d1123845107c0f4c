"""A mistake in a task is one sentence, before anything is trained."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from digits import Batch, Data, Digits, DigitTask, FunctionTask, Head
from rich.console import Console
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader

from lightning_peft.compare.plan import Plan, Row
from lightning_peft.compare.run import run
from lightning_peft.tasks import Measure, Section, Split

pytestmark = pytest.mark.filterwarnings("ignore")

COUNT = itertools.count()
ROWS = [Row("base", "Base", "base"), Row("head", "Head", "tuned", Head(), learning_rates=[1e-3], max_epochs=1)]
TAKEN = ("target", "prediction")


def module_of(**methods: Any) -> type[Digits]:
    return type("Mine", (Digits,), methods)


def task_of(kind: type[Digits] = Digits, base: type[DigitTask] = DigitTask, **attributes: Any) -> DigitTask:
    def make(self: DigitTask) -> Digits:
        fresh = DigitTask.module(self)
        fresh.__class__ = kind
        return fresh

    return type("MyTask", (base,), {"module": make, **attributes})()


def returning(**columns: Callable[[Batch, int, dict[str, Any]], Any]) -> type[Digits]:
    """A module whose `test_step` returns other columns."""

    def test_step(self: Digits, batch: Batch, batch_idx: int) -> dict[str, Any]:
        outputs = Digits.test_step(self, batch, batch_idx)
        return outputs | {name: column(batch, batch_idx, outputs) for name, column in columns.items()}

    return module_of(test_step=test_step)


def with_data(change: Callable[[Data], Any]) -> DigitTask:
    """A task whose data is changed, or is what the change returns."""

    def data(self: DigitTask, split: Split) -> Any:
        kind = type("MyData", (Data,), {})
        made = kind(split, 32)
        changed = change(made)
        return made if changed is None else changed

    return task_of(data=data)


def function(measure: Callable[..., Any], columns: tuple[str, ...] = TAKEN) -> DigitTask:
    return task_of(measures={"own": Measure("Own", "my own", columns=columns, function=measure)})


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


class WithoutTest(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return []


class WithoutValidation(L.LightningDataModule):
    def __init__(self, data: Data) -> None:
        super().__init__()
        self.test_dataloader = data.test_dataloader  # type: ignore[method-assign]


class Missing(Section):
    name, title = "other", "Other"
    measures: ClassVar[Mapping[str, Measure]] = {"calibration": Measure("Calibration", "of confidence")}


def other_head(self: DigitTask) -> Digits:
    module = DigitTask.module(self)
    torch.manual_seed(next(COUNT))
    torch.nn.init.normal_(module.head.weight)
    return module


def fixed_rate(self: Digits) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.5)


def empty(data: Data) -> None:
    setattr(data, "val_dataloader", lambda: DataLoader([]))  # noqa: B010


def logging(name: str | None) -> Callable[..., None]:
    def validation_step(self: Digits, batch: Batch, batch_idx: int) -> None:
        if name is not None:
            self.log(name, self.loss(batch))

    return validation_step


SAME_MODULE = DigitTask().module()


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        # numbers of units
        (
            task_of(returning(unit=lambda b, i, o: torch.arange(len(b[2])) / 10)),
            r"^Mine.test_step returned 0\.1\d* as the number of a unit: number units with integers, such as",
        ),
        (
            task_of(returning(unit=lambda b, i, o: torch.arange(len(b[2])))),
            r"^Unit 0 was tested twice in one test: Mine.test_step must number units across the whole data set, not",
        ),
        (task_of(returning(unit=lambda b, i, o: [7] * len(b[2]))), r"^Unit 7 was tested twice"),
        (
            task_of(returning(unit=lambda b, i, o: [f"image-{n}" for n in b[2].tolist()])),
            r"^Mine.test_step returned 'image-\d+' as the number of a unit: number units with integers",
        ),
        (
            task_of(returning(unit=lambda b, i, o: b[2][:, None])),
            r"^Mine.test_step must return the number of each unit under 'unit', \[B\]; it returned \[32, 1\]\.$",
        ),
        # columns
        (
            task_of(returning(accuracy=lambda b, i, o: o["accuracy"].mean())),
            r"must return the measure 'accuracy' \[B\]; it returns \[\] for 32 units\.$",
        ),
        (
            task_of(returning(nll=lambda b, i, o: o["nll"][:, None])),
            r"must return the measure 'nll' \[B\]; it returns \[32, 1\] for 32 units\.$",
        ),
        (
            task_of(returning(prediction=lambda b, i, o: [1, 2]), base=FunctionTask),
            r"must return 'prediction', which 'f1' takes \[B\]; it returns a list of 2 for 32 units\.$",
        ),
        (
            task_of(returning(accuracy=lambda b, i, o: ["yes"] * len(b[2]))),
            r"^The measure 'accuracy' of image \d+ is 'yes': a score is a number\.$",
        ),
        (
            task_of(sections=[Missing()]),
            r"^test_step does not return 'calibration' \[B\], which the section 'other' shows; it returns 'unit'",
        ),
        # modules
        (
            task_of(module=other_head),
            r"^MyTask.module must give the same weights each time.*: set the seed in it, "
            r".*; head.weight differs\.$",
        ),
        (
            task_of(module=lambda self: SAME_MODULE),
            r"^MyTask.module must return a new module each time, for rows adapt",
        ),
        (task_of(module=lambda self: 3), r"^MyTask.module must return a LightningModule; it returned an int\.$"),
        (task_of(module=lambda self: None), r"^MyTask.module must return a LightningModule; it returned nothing\.$"),
        (task_of(module=raising(KeyError("x"))), r"^MyTask.module failed: KeyError: 'x'\.$"),
        (
            task_of(module_of(configure_optimizers=fixed_rate)),
            r"^Mine.configure_optimizers does not use self.learning_rate, which each row sets: its optimizer has lr 0",
        ),
        # data
        (task_of(data=lambda self: None), r"^MyTask.data must take a split .*: too many positional arguments\.$"),
        (task_of(data=lambda self, split, folder: None), r"^MyTask.data must take a split .*: missing .*'folder'\.$"),
        (
            with_data(lambda data: data.test_dataloader()),
            r"^MyTask.data must return a LightningDataModule; it returned a",
        ),
        (
            with_data(lambda data: WithoutTest()),
            r"^WithoutTest, which MyTask.data returned, has no test_dataloader: its",
        ),
        (
            with_data(lambda data: setattr(data, "test_dataloader", raising(KeyError("images")))),
            r"^The test set could not be read: KeyError: 'images'\.$",
        ),
        # steps
        (
            task_of(module_of(test_step=raising(IndexError("no such class")))),
            r"^Mine.test_step failed on test batch 1: IndexError: no such class \(test_first_check.py, line \d+\)\.$",
        ),
        (
            task_of(module_of(test_step=raising(ValueError("no such class.")))),
            r"^Mine.test_step failed on test batch 1: ValueError: no such class \(test_first_check.py, line \d+\)\.$",
        ),
        (
            task_of(module_of(validation_step=raising(IndexError("no such class")))),
            r"^Mine.validation_step failed on validation batch 1: IndexError: no such class \(test_first_check",
        ),
        # validation
        (
            with_data(WithoutValidation),
            r"^WithoutValidation, which MyTask.data returned, has no val_dataloader, but learning rates and epochs are "
            r"chosen by 'val_loss': give it a validation set",
        ),
        (with_data(empty), r"^The validation set of MyData, which MyTask.data returned, is empty, but learning rates"),
        (
            task_of(module_of(validation_step=logging("loss"))),
            r"^Mine logs no 'val_loss' in validation, but .*: log it, or set `monitor` of MyTask to .* is loss\.$",
        ),
        (
            task_of(module_of(validation_step=logging(None))),
            r"^Mine logs no 'val_loss' in validation, .* is nothing\.$",
        ),
        # measures
        (task_of(measures=["accuracy"]), r"^measures of MyTask must be a dict of Measure by name, got a list\.$"),
        (
            task_of(measures={"accuracy": "Accuracy"}),
            r"^measures of MyTask must be a dict of Measure by name, but 'accuracy' is a str\.$",
        ),
        (
            function(lambda target: 1.0),
            r"^The function of the measure 'own' cannot take the columns target, prediction .* number: TypeError: ",
        ),
        (function(lambda target, prediction: np.array([1.0, 2.0])), r"and give a number: TypeError: only "),
        (
            task_of(
                returning(prediction=lambda b, i, o: ["high"] * len(b[2])),
                measures={
                    "auroc": Measure("AUROC", "area", columns=TAKEN, function=lambda t, p: roc_auc_score(t == t[0], p))
                },
            ),
            r"and give a number: ValueError: dtype='numeric' is not compatible",
        ),
    ],
)
def test_a_mistake_in_a_task_is_one_sentence_before_anything_is_trained(
    task: DigitTask, sentence: str, tmp_path: Any
) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        run(Plan("mine", ROWS, task, str(tmp_path), accelerator="cpu"), console=Console(quiet=True))
    assert "\n" not in str(caught.value) and not (tmp_path / "cells").exists()


def half(self: Digits) -> Any:
    optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate / 2)
    return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))]


def cycle(self: Digits) -> Any:
    optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=1000)
    return {"optimizer": optimizer, "lr_scheduler": schedule}


def of_trainer(self: Digits) -> Any:
    return torch.optim.SGD(self.parameters(), lr=self.trainer.max_epochs / 10)


@pytest.mark.parametrize(
    "task",
    [
        *(task_of(module_of(configure_optimizers=rates)) for rates in (half, cycle, of_trainer)),
        task_of(returning(unit=lambda b, i, o: b[2].double())),
        task_of(returning(unit=lambda b, i, o: b[2].numpy(), accuracy=lambda b, i, o: o["accuracy"].numpy())),
        task_of(returning(mean=lambda b, i, o: o["nll"].mean(), logits=lambda b, i, o: o["nll"][:, None])),
        function(raising(ValueError("Only one class is present"))),
        function(raising(ZeroDivisionError("nothing"))),
        function(lambda target, prediction: float("nan")),
    ],
)
def test_what_may_be_right_is_run(task: DigitTask, tmp_path: Any) -> None:
    results = run(Plan("mine", ROWS, task, str(tmp_path), accelerator="cpu"), console=Console(quiet=True))
    assert [row["failed"] for row in results["rows"]] == [None, None]


def test_a_measure_that_is_not_a_number_is_a_caveat(tmp_path: Any) -> None:
    task = function(lambda target, prediction: float("nan"))
    results = run(Plan("mine", ROWS[:1], task, str(tmp_path), accelerator="cpu"), console=Console(quiet=True))
    assert results["rows"][0]["metrics"] == {} and "Base: Own could not be computed" in results["caveats"][0]


def test_without_tuned_rows_no_validation_is_needed(tmp_path: Any) -> None:
    plan = Plan("mine", ROWS[:1], with_data(WithoutValidation), str(tmp_path), accelerator="cpu")
    assert run(plan, console=Console(quiet=True))["rows"][0]["failed"] is None


def test_what_a_step_raised_is_the_cause(tmp_path: Any) -> None:
    error = IndexError("no such class")
    plan = Plan("mine", ROWS, task_of(module_of(test_step=raising(error))), str(tmp_path), accelerator="cpu")
    with pytest.raises(ValueError, match="no such class") as caught:
        run(plan, console=Console(quiet=True))
    assert caught.value.__cause__ is error
