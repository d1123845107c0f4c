"""Tasks whose units are choices among answers, by their log-probabilities."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from torch import Tensor

from lightning_peft.tasks.cell import Cell
from lightning_peft.tasks.cell_records import CellRecords
from lightning_peft.tasks.scoring import Scoring
from lightning_peft.tasks.task import Task
from lightning_peft.tasks.unit_scores import UnitScores


class ChoiceTask(Task):
    """A task of a causal language model in which a unit is a prompt with answers to it, some right and some wrong.

    `data(split, units_per_batch=1)` then tests one unit a batch: `input_ids`, `attention_mask`, `labels [C, T]` (-100
    outside the answer), `group [C]`, the unit's number, and columns that say what each answer is. And
    `data(split, edits=True)` trains on labelled texts: `input_ids`, `attention_mask [B, T]`, `label [B]` in {0, 1},
    `group [B]`. So ways of scoring choices otherwise, and edits of many strengths at a time, can be put to it.
    """

    @abstractmethod
    def choice_scores(self, logprobs: Tensor, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Return one unit's score by each measure that it has choices for.

        Args:
            logprobs: `[C]`, of its answers, in nats.
            batch: the unit's.
        """

    @property
    def records(self) -> CellRecords:
        """The columns of each unit; of a row with a scoring, those that its scores of choices give."""
        return ChoiceRecords(self)


class ChoiceRecords(CellRecords):
    """The columns of each unit, of a row with a scoring by `choice_scores` of what it gives each unit's choices.

    Args:
        task: the task.
    """

    task: ChoiceTask

    def scores_of(self, cell: Cell) -> UnitScores:
        return self.task.scores() if cell.scoring is None else ScoredChoices(self.task, cell.scoring)

    def data_of(self, cell: Cell, draw: int) -> L.LightningDataModule:
        alone = {} if cell.scoring is None else {"units_per_batch": 1}
        return self.task.data(cell.split, **cell.options_of(draw), **alone)


class ScoredChoices(UnitScores):
    """Scores the choices of each test batch, which is one unit's, whatever `test_step` makes of them.

    Args:
        task: says what the scores are worth.
        scoring: gives them.
    """

    def __init__(self, task: ChoiceTask, scoring: Scoring) -> None:
        super().__init__()
        self.task, self.scoring = task, scoring
        self._score: Callable[[dict[str, Tensor]], Tensor] | None = None

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._here, self._score = defaultdict(dict), None

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: object
    ) -> None:
        if self._score is None:
            module: Any = pl_module
            self._score = self.scoring(module)
        units = set(batch["group"].tolist())
        if len(units) != 1:
            raise ValueError(
                f"A row with a scoring is tested one unit a batch, but a batch has {len(units)}: let "
                f"{type(self.task).__name__}.data take units_per_batch."
            )
        columns = {name: values.cpu() for name, values in batch.items() if isinstance(values, Tensor)}
        for name, value in self.task.choice_scores(self._score(batch).cpu(), columns).items():
            self._here[name][int(*units)] = value
