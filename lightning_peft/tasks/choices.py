"""Tasks whose units are choices among answers, by their log-probabilities."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor

from lightning_peft.tasks.cell import Cell
from lightning_peft.tasks.cell_records import CellRecords
from lightning_peft.tasks.choice_units import ChoiceUnitScores
from lightning_peft.tasks.task import Task
from lightning_peft.tasks.unit_scores import UnitScores


class ChoiceTask(Task):
    """A task of a language model in which a unit is a prompt with answers to it, some right and some wrong.

    `data(split)` tests batches of whole units: `input_ids`, `attention_mask`, `labels [C, T]` (-100 outside the
    answer), `group [C]`, the number of each answer's unit, and columns `[C]` that say what each answer is. The answers
    are scored in the place of the module's `test_step`. `data(split, units_per_batch=1)` tests one unit a batch, for a
    sweep, and `data(split, edits=True)` trains on labelled texts: `input_ids`, `attention_mask [B, T]`, `label [B]` in
    {0, 1}, `group [B]`.
    """

    def scores(self) -> UnitScores:
        """Return what scores each unit's answers while a Trainer tests."""
        return ChoiceUnitScores(self.choice_scores)

    @abstractmethod
    def choice_scores(self, logprobs: Tensor, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Return one unit's score by each measure that it has choices for.

        Args:
            logprobs: `[C]`, of its answers, in nats.
            batch: the unit's.
        """

    @property
    def records(self) -> CellRecords:
        """The columns of each unit."""
        return ChoiceRecords(self)


class ChoiceRecords(CellRecords):
    """The columns of each unit, whose answers a row with a scoring scores by that.

    Args:
        task: the task.
    """

    task: ChoiceTask

    def scores_of(self, cell: Cell) -> UnitScores:
        return self.task.scores() if cell.scoring is None else ChoiceUnitScores(self.task.choice_scores, cell.scoring)
