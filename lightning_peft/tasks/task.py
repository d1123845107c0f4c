"""The contract between a comparison and what it compares on."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import lightning as L

from lightning_peft.tasks.arguments import bound_arguments
from lightning_peft.tasks.cell_records import CellRecords
from lightning_peft.tasks.measure import Measure
from lightning_peft.tasks.section import Section
from lightning_peft.tasks.split import Split
from lightning_peft.tasks.unit_scores import UnitScores


class Task(ABC):
    """A module, its data by split, and what is measured; a comparison knows nothing else.

    A task of one's own has `measures`, `module` and `data`; the rest has defaults.

    Attributes:
        measures: by name, in the order of the table's columns.
        monitor: the logged validation metric, the lower the better, that learning rates and epochs are chosen by.
        unit: what a unit is called in sentences, in the singular.
        label: what the labels of texts that edits read tell, in sentences.
        folds: every unit is tested once, by a module that has not seen its fold.
        own_test_set: whether the units that are tested are a set of their own, which no fold learns from: `folds` is
            then 1.
        seed: of the split into folds.

    Example:
        >>> class Digits(Task):  # doctest: +SKIP
        ...     measures = {"accuracy": Measure("Accuracy", "share of digits told right", range=(0, 1))}
        ...     def module(self):
        ...         return DigitClassifier.load_from_checkpoint("digits.ckpt")
        ...     def data(self, split):
        ...         return DigitData(split.fold, split.folds, split.seed)
    """

    measures: ClassVar[Mapping[str, Measure]]
    monitor: str = "val_loss"
    unit: str = "unit"
    label: str = "label"
    folds: int = 2
    own_test_set: bool = False
    seed: int = 0

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the arguments, which finished cells depend on."""
        task = super().__new__(cls)
        task._made_with = bound_arguments(cls, args, kwargs)
        return task

    _made_with: dict[str, Any]

    @property
    def primary(self) -> str:
        """The name of the measure that ranks the rows and that strengths are chosen by; by default the first."""
        return next(iter(self.measures))

    @abstractmethod
    def module(self) -> L.LightningModule:
        """Return the pretrained module, the same each time.

        Its `learning_rate` is set before it is tuned. Its `test_step` returns what `scores` gathers. Where it takes a
        keyword `seed`, what is new in the module, such as a head, is drawn with that: the same for one seed, other for
        another.
        """

    def seeded_module(self, seed: int) -> L.LightningModule:
        """Return the module of a seed: of a task whose `module` takes none, always the same."""
        make: Any = self.module
        return make(seed=seed) if "seed" in inspect.signature(make).parameters else make()

    @abstractmethod
    def data(self, split: Split, *_: Any, **row_options: Any) -> L.LightningDataModule:
        """Return the data of a split, whose test set has the units that are tested.

        A task names the row options that it takes as keyword arguments, with defaults: `batch_size`; `few_shot`, a
        number of demonstrations, and `draw`, which of several draws of them; `edits`, whether the training set is for
        an edit, which reads labelled texts; `seed`, of the order of training batches. Those that a row does not set are
        not given.

        Raises:
            ValueError: the split cannot be made.
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
        """Further tables, such as side effects or free answers; by default none. They are made anew for each run."""
        return ()

    @property
    def records(self) -> CellRecords:
        """What a comparison keeps of this task's cells; by default the units' columns."""
        return CellRecords(self)
