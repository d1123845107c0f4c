"""The first batches of a comparison, run before anything that costs time, so that a task's mistakes are noticed."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_peft.tasks.cell import Cell
from lightning_peft.tasks.fresh_modules import check_learning_rate, fresh_module
from lightning_peft.tasks.section import Section
from lightning_peft.tasks.unit_scores import UnitScores

if TYPE_CHECKING:
    from lightning_peft.tasks.cell_records import CellRecords
    from lightning_peft.tasks.task import Task

_BATCHES = 2  # that are tested: numbers of units that begin anew with each batch show in the second

_OF_TEXTS = ("could not convert string", "not compatible with arrays of bytes/strings")  # Python's and scikit-learn's


def first_check(records: CellRecords, missing: Sequence[Cell]) -> None:
    """Test the first batches of the first missing cell, and validate one of the first that is tuned.

    Args:
        records: the task's.
        missing: the cells that are to be computed, at least one.

    Raises:
        ValueError: in one sentence, for what would end cells after they have begun or give wrong numbers.
    """
    task, tuned = records.task, next((cell for cell in missing if cell.tuned), None)
    module = fresh_module(type(task).__name__, lambda: _module(task, missing[0].seed))
    if tuned is not None:
        check_learning_rate(module)
    scores, data = task.scores(), _data(task, missing[0])
    if not is_overridden("test_dataloader", data, L.LightningDataModule):
        raise ValueError(
            f"{_returned(task, data)} has no test_dataloader: its test set has the units of the fold that is tested."
        )
    with _where(module, "test") as where:
        trainer = missing[0].trainer([where.first, scores, where.last], limit_test_batches=_BATCHES)
        trainer.test(module, datamodule=data, verbose=False)
    records.checked(scores)
    for section in task.sections:
        _check_section(section, scores)
    for name, measure in task.measures.items():
        if measure.function is not None:
            _check_function(records, name, scores)
    if tuned is not None:
        _check_validation(task, tuned, module)


def _module(task: Task, seed: int) -> L.LightningModule:
    """Return the task's module; raise `ValueError` where it is none."""
    name = f"{type(task).__name__}.module"
    try:
        module: Any = task.seeded_module(seed)
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"{name} failed: {_words(error)}.") from error
    if not isinstance(module, L.LightningModule):
        raise ValueError(f"{name} must return a LightningModule; it returned {_a(module)}.")
    return module


def _data(task: Task, cell: Cell) -> L.LightningDataModule:
    """Return the data of a cell; raise `ValueError` where it is none."""
    name = f"{type(task).__name__}.data"
    try:
        data: Any = task.data(cell.split, **cell.options_of(0))
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"{name} failed: {_words(error)}.") from error
    if not isinstance(data, L.LightningDataModule):
        raise ValueError(f"{name} must return a LightningDataModule; it returned {_a(data)}.")
    return data


def _check_section(section: Section, scores: UnitScores) -> None:
    """Raise `ValueError` where a section of columns has one that `test_step` does not return."""
    if type(section).scores is not Section.scores:
        return
    for name in section.measures:
        if name not in scores.columns:
            returned = scores.misshapen.get(name, scores.returned)
            raise ValueError(
                f"test_step does not return {name!r} [B], which the section {section.name!r} shows; it returns "
                f"{returned}."
            )


def _check_function(records: CellRecords, name: str, scores: UnitScores) -> None:
    """Raise `ValueError` where a measure's function cannot take its columns; so few units may give it nothing."""
    measure = records.task.measures[name]
    try:
        records.value(name, scores.columns)
    except (TypeError, AttributeError, NameError, ImportError, ValueError) as error:
        # of a ValueError most say that a batch has too few classes
        if isinstance(error, ValueError) and not any(words in str(error) for words in _OF_TEXTS):
            return
        raise ValueError(
            f"The function of the measure {name!r} cannot take the columns {', '.join(measure.columns)} of the first "
            f"test batches and give a number: {_words(error)}."
        ) from error
    except Exception:  # undefined on so few units, such as a share of none
        return


def _check_validation(task: Task, cell: Cell, module: L.LightningModule) -> None:
    """Raise `ValueError` where a batch of the validation set gives nothing to choose learning rates and epochs by."""
    data = _data(task, cell)
    needed = f"learning rates and epochs are chosen by {task.monitor!r}"
    if not is_overridden("val_dataloader", data, L.LightningDataModule):
        raise ValueError(
            f"{_returned(task, data)} has no val_dataloader, but {needed}: give it a validation set outside the fold "
            "that is tested."
        )
    if not is_overridden("validation_step", module, L.LightningModule):
        raise ValueError(f"{type(module).__name__} has no validation_step, but {needed}, which it must log.")
    with _where(module, "validation") as where:
        trainer = cell.trainer([where.first, where.last], limit_val_batches=1)
        trainer.validate(module, datamodule=data, verbose=False)
    if not where.batches:
        raise ValueError(f"The validation set of {_returned(task, data)} is empty, but {needed}.")
    if task.monitor not in trainer.callback_metrics:
        logged = ", ".join(trainer.callback_metrics) or "nothing"
        raise ValueError(
            f"{type(module).__name__} logs no {task.monitor!r} in validation, but {needed}: log it, or set `monitor` "
            f"of {type(task).__name__} to what it logs, which is {logged}."
        )


class _First(Callback):
    """Note that a step begins, and that it has ended."""

    def __init__(self, where: _Where) -> None:
        self.where = where

    def on_test_batch_start(self, *_: object) -> None:
        self.where.now, self.where.batches = "step", self.where.batches + 1

    def on_test_batch_end(self, *_: object) -> None:
        self.where.now = "scores"

    def on_test_epoch_end(self, *_: object) -> None:
        self.where.now = "scores"

    def on_validation_batch_start(self, *_: object) -> None:
        self.on_test_batch_start()

    def on_validation_batch_end(self, *_: object) -> None:
        self.on_test_batch_end()


class _Last(Callback):
    """Note that the batch's scores were taken, and the next is read."""

    def __init__(self, where: _Where) -> None:
        self.where = where

    def on_test_batch_end(self, *_: object) -> None:
        self.where.now = "data"

    def on_validation_batch_end(self, *_: object) -> None:
        self.where.now = "data"


class _Where:
    """Where a loop is: in its `data`, in a `step`, or in the `scores` of one; `batches` have begun."""

    def __init__(self) -> None:
        self.now, self.batches = "data", 0
        self.first, self.last = _First(self), _Last(self)


@contextmanager
def _where(module: L.LightningModule, stage: str) -> Iterator[_Where]:
    """Give what notes where a loop is; raise its error as one sentence that says so."""
    where = _Where()
    try:
        yield where
    except Exception as error:
        if where.now == "scores" and isinstance(error, ValueError):
            raise
        step = f"{type(module).__name__}.{stage}_step"
        place = {
            "data": f"The {stage} set could not be read",
            "step": f"{step} failed on {stage} batch {where.batches}",
            "scores": f"What {step} returned could not be read",
        }
        line = _line_of(getattr(type(module), f"{stage}_step"), error) if where.now == "step" else ""
        raise ValueError(f"{place[where.now]}: {_words(error)}{line}.") from error


def _line_of(step: Any, error: Exception) -> str:
    """Return, in brackets, the file and line of a step that an error came through."""
    code = getattr(step, "__code__", None)
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code is code]
    return f" ({Path(code.co_filename).name}, line {lines[-1]})" if code is not None and lines else ""


def _words(error: Exception) -> str:
    """Return an error's type and message in one line, without a full stop."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(" .:")


def _a(value: object) -> str:
    name = type(value).__name__
    return "nothing" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _returned(task: Task, data: object) -> str:
    return f"{type(data).__name__}, which {type(task).__name__}.data returned,"
