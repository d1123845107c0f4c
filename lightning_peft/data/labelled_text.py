"""Texts, or pairs of them, with a class each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from torch.utils.data import DataLoader

from lightning_peft.data.files import NamedClass, Row
from lightning_peft.data.row_data import Example, Kind, RowData, normal, numbered
from lightning_peft.data.row_options import RowOptions
from lightning_peft.files.data_error import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LabelledText(RowData):
    """Texts, or pairs of them, with a class each: for `SequenceClassifier`, whose `num_labels` is their number.

    Batches have `labels [B]`, the number of each text's class in `class_names`. `predict` takes all rows, in the file's
    order.

    Args:
        path: see `RowData`.
        tokenizer: see `RowData`.
        text: the column of the text.
        text_pair: the column of a second text, encoded behind the first.
        label: the column of the class: a word or a number.
        classes: the names of the classes, in their order. Default: those of the file, sorted, or as the hub has them.
        **options: see `RowOptions`; a text, or a pair, longer than `max_length` is cut at its end.

    Attributes:
        class_names: the name of each class, after `prepare_data` or `setup`. They are saved in checkpoints, and a file
            that is tested from one takes their order.

    Example:
        >>> data = LabelledText("reviews.csv", text="review", label="rating")
        >>> trainer.fit(SequenceClassifier("bert-base-uncased", num_labels=3), data)  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        text: str = "text",
        text_pair: str | None = None,
        label: str = "label",
        classes: list[str] | None = None,
        **options: Unpack[RowOptions],
    ) -> None:
        super().__init__(path, tokenizer, **options)
        self.text, self.text_pair, self.label = text, text_pair, label
        self.classes = None if classes is None else list(classes)
        self.class_names: list[str] = []

    def columns(self) -> Sequence[str]:
        return [self.text, self.label] + ([] if self.text_pair is None else [self.text_pair])

    def check(self) -> None:
        names = {self._name(row): row for row in reversed(self.rows)}  # with the first row of each
        for row in self.rows:
            row.text(self.text)
            if self.text_pair is not None:
                row.text(self.text_pair)
        self.class_names = self.classes or _ordered(self.rows, self.label, list(names))
        if len(self.class_names) < 2:
            raise DataError(f"{self.path} has rows of one class only, {self.class_names[0]!r}: two or more are needed.")
        for name, row in reversed(names.items()):
            self._number(name, row)

    def groups(self) -> list[int]:
        return numbered([tuple(map(normal, self._texts(row))) for row in self.rows])

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        module: Any = None if self.trainer is None else self.trainer.lightning_module
        if module is not None:
            self._check_module(module, stage)

    def encode(self, row: Row, kind: Kind) -> list[Example]:
        limits: dict[str, Any] = {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}
        ids = list(self.encoder(*self._texts(row), **limits)["input_ids"])
        return [{"input_ids": ids, "labels": self._number(self._name(row), row), "group": 0}]

    def predict_dataloader(self) -> DataLoader:
        return self._loader([example for n in range(len(self.rows)) for example in self._encoded(n, "answers")])

    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints keep: the names of the classes."""
        return {"class_names": self.class_names}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the order of classes that a checkpoint was trained with."""
        saved = [str(name) for name in state_dict["class_names"]]
        if self.classes is not None and self.classes != saved:
            raise ValueError(
                f"The checkpoint knows the classes {', '.join(saved)}, in this order, but classes are "
                f"{', '.join(self.classes)}."
            )
        self.classes = self.class_names = saved
        for row in self.rows:
            self._number(self._name(row), row)

    def _texts(self, row: Row) -> list[str]:
        return [row.text(column) for column in (self.text, self.text_pair) if column is not None]

    def _name(self, row: Row) -> str:
        value: Any = row.values.get(self.label)
        if isinstance(value, NamedClass):
            return value.name
        if isinstance(value, float) and value.is_integer():  # as tables with a gap have whole numbers
            value = int(value)
        if value is None or isinstance(value, list | dict) or not str(value).strip():
            raise DataError(f"{row.where}: {self.label!r} must be a word or a number, got {value!r}.")
        return str(value).strip()

    def _number(self, name: str, row: Row) -> int:
        if name not in self.class_names:
            raise DataError(f"{row.where}: {self.label!r} is {name!r}, none of {', '.join(self.class_names)}.")
        return self.class_names.index(name)

    def _check_module(self, module: Any, stage: str | None) -> None:
        """Raise `ValueError` where the module is a language model, or has another number of classes.

        A file that is only tested may lack a class, whose name the checkpoint knows.
        """
        count = len(self.class_names)
        backbone = getattr(module, "backbone", None)
        head = getattr(backbone, "get_output_embeddings", lambda: None)()
        if head is not None and getattr(module, "num_labels", None) is None:
            raise ValueError(
                f"LabelledText gives classes of texts, and {type(module).__name__} learns tokens: use "
                f"SequenceClassifier with num_labels={count} (--model SequenceClassifier --model.num_labels {count})."
            )
        given = getattr(module, "hparams", {}).get("num_labels")
        if given is not None and (given < count or (given > count and stage == "fit")):
            raise ValueError(
                f"{self.path} has {count} classes ({', '.join(self.class_names)}), but num_labels is {given}: set it "
                f"to {count}."
            )


def _ordered(rows: Sequence[Row], column: str, names: Sequence[str]) -> list[str]:
    """Return the names of classes in their order: the hub's, that of numbers, or the alphabet's."""
    values = [row.values[column] for row in rows]
    named = {int(value): value.name for value in values if isinstance(value, NamedClass)}
    if len(named) == len(names):
        return [named[number] for number in sorted(named)]
    if all(name.isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names)
