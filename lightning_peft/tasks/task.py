"""The contract between a comparison and what it compares on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning as L

from lightning_peft.tasks.measure import Measure
from lightning_peft.tasks.section import Section
from lightning_peft.tasks.split import Split
from lightning_peft.tasks.unit_scores import UnitScores

Scores = dict[str, dict[int, list[float]]]  # by column and unit, one value a draw


class Task(ABC):
    """A module, its data by split, and what is measured; a comparison knows nothing else.

    Attributes:
        measures: by name, in the order of the table's columns.
        monitor: the logged validation metric, the lower the better, that learning rates and epochs are chosen by.
        unit: what a unit is called in sentences, in the singular.
        folds: every unit is tested once, by a module that has not seen its fold.
        seed: of the split into folds.
    """

    measures: ClassVar[Mapping[str, Measure]]
    monitor: str = "val_loss"
    unit: str = "unit"
    folds: int = 2
    seed: int = 0

    @property
    def primary(self) -> str:
        """The name of the measure that ranks the rows and that strengths are chosen by; by default the first."""
        return next(iter(self.measures))

    @abstractmethod
    def module(self) -> L.LightningModule:
        """Return the pretrained module, the same each time.

        A `learning_rate` attribute is set before it is tuned. Its `test_step` returns what `scores` gathers.
        """

    @abstractmethod
    def data(self, split: Split, **row_options: Any) -> L.LightningDataModule:
        """Return the data of a split; `row_options` are the row's, such as `batch_size`.

        Raises:
            ValueError: the split cannot be made, or a row option is not one of this task's.
        """

    def scores(self) -> UnitScores:
        """Return what gathers each unit's columns while a Trainer tests."""
        return UnitScores()

    def depends_on(self) -> Any:
        """Return what its numbers depend on beside its arguments, JSON-able, such as a hash of a data file.

        A finished cell is computed again where this, an argument or its row has changed.
        """
        return None

    def check(self) -> None:  # noqa: B027 - there may be nothing to check
        """Raise `ValueError` in one sentence for what would end a comparison after it has begun."""

    @property
    def sections(self) -> Sequence[Section]:
        """Further tables, such as side effects or free answers; by default none."""
        return ()
