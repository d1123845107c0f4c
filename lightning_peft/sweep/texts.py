"""The texts of one split of a task: what is learnt from, and the units that are measured."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import Tensor, nn

from lightning_peft.backbone.window import check_lengths, lengths_of
from lightning_peft.compare.writing import plural
from lightning_peft.sweep.settings import Sweep, data_options
from lightning_peft.tasks import Split

Batch = Mapping[str, Tensor]
Text = tuple[int, tuple[int, ...]]  # its group, and its tokens
_SPLITS = {"validation": {"chosen": False, "validation": True}, "test": {"test": False}}  # and which are inner


@dataclass(frozen=True)
class SplitTexts:
    """The texts of a split.

    Args:
        labels: of each text that is learnt from, by its group and tokens, in the order of the batches.
        units: the batch of each unit that is measured, by its number.
        demonstrations: how many stand before each prompt and how many were to, where they were made to fit.
    """

    labels: dict[Text, int]
    units: dict[int, Batch]
    demonstrations: tuple[int, int] | None = None

    @property
    def groups(self) -> int:
        """How many groups of texts are learnt from."""
        return len({group for group, _ in self.labels})


def splits_of(plan: Sweep, module: L.LightningModule) -> dict[str, SplitTexts]:
    """Read every split of a sweep: of each fold the whole and the inner one, or the whole alone.

    Args:
        plan: the sweep.
        module: what the data modules find as their Trainer's LightningModule, for its tokenizer.

    Returns:
        The texts by name, `"chosen-fold0"` and `"validation-fold0"`, or `"test-fold0"`.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # of devices, of which it uses none
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    splits, task = {}, plan.task
    for fold in range(task.folds):
        for name, inner in _SPLITS[plan.split].items():
            data = task.data(Split(fold, task.folds, task.seed, inner=inner), **data_options(plan))
            data.trainer = trainer
            data.prepare_data()
            data.setup("fit")
            data.setup("test")
            splits[f"{name}-fold{fold}"] = read_split(data)
    return splits


def read_split(data: L.LightningDataModule) -> SplitTexts:
    """Read the texts of a data module that is set up.

    Raises:
        ValueError: a batch lacks a key, or a test batch does not hold one whole unit.
    """
    labels: dict[Text, int] = {}
    for batch in data.train_dataloader():
        ids, real = _column(batch, "input_ids"), _column(batch, "attention_mask").bool()
        for row, mask, label, group in zip(ids, real, _column(batch, "label"), _column(batch, "group"), strict=True):
            labels[int(group), tuple(row[mask].tolist())] = int(label)
    units: dict[int, Batch] = {}
    for batch in data.test_dataloader():
        numbers = _column(batch, "group").unique().tolist()
        if len(numbers) != 1:
            raise ValueError(
                f"With units_per_batch=1 a test batch must hold one unit's answers, but one has those of {numbers}."
            )
        if numbers[0] in units:
            raise ValueError(f"The unit {numbers[0]} comes in two test batches: all its answers must stand in one.")
        units[numbers[0]] = batch
    return SplitTexts(labels, units, getattr(data, "demonstrations", None))


def check_texts(backbone: nn.Module, unit: str, splits: Mapping[str, SplitTexts]) -> None:
    """Raise, or warn, where a text is longer than the model can read.

    Raises:
        ContextWindowError: the model has no positions for so many tokens.
    """
    for texts in splits.values():
        lengths = (length for batch in texts.units.values() for length in lengths_of(batch))
        check_lengths(backbone, lengths, f"{plural(unit)} with their choices", whole=True)
        check_lengths(backbone, (len(tokens) for _, tokens in texts.labels), "statements", whole=True)


def _column(batch: Any, name: str) -> Tensor:
    """Return a column of a batch.

    Raises:
        ValueError: it has none of this name.
    """
    if isinstance(batch, Mapping) and name in batch:
        return batch[name]
    keys = ", ".join(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(
        f"A batch of the task's data has no {name!r}, it has {keys}: see ChoiceTask for what its batches hold."
    )
