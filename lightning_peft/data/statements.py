"""Labelled texts: some wanted (or true), some not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

from lightning_peft.data.files import Row
from lightning_peft.data.row_data import Example, Kind, RowData, check_kind, normal, numbered
from lightning_peft.data.row_options import RowOptions
from lightning_peft.files.data_error import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LABELS = {"1": 1, "1.0": 1, "true": 1, "yes": 1, "0": 0, "0.0": 0, "false": 0, "no": 0}


class Statements(RowData):
    """Texts with a label each: what ITI, CAA and the other edits read; or the wanted ones, to tune on.

    Args:
        path: see `RowData`.
        tokenizer: see `RowData`.
        text: the column of the text.
        label: the column that says whether a text is wanted (true): 1, `true` or `yes`; or not: 0, `false` or `no`.
        group: the column that says which texts belong together, as those about one question: equal values do. CAA and
            RepE compare texts within a group, and a group is never split between training and validation. Default:
            `"group"` where the file has it; else each text is its own.
        train: `"statements"`: training batches hold all texts, and nothing to learn by gradient; `"answers"`: those
            that are wanted, to tune on. Default: statements where the Trainer computes an edit, else answers.
        **options: see `RowOptions`; a text longer than `max_length` is left out.

    Example:
        >>> from lightning_peft.callbacks import ITI
        >>> data = Statements("my.jsonl", batch_size=8)  # {"text": "Water is wet.", "label": 1, "group": "water"}
        >>> trainer.fit(module, data)  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        text: str = "text",
        label: str = "label",
        group: str | None = None,
        train: Kind | None = None,
        **options: Unpack[RowOptions],
    ) -> None:
        check_kind(train)
        super().__init__(path, tokenizer, **options)
        self.text, self.label, self.group, self.kind = text, label, group, train

    def columns(self) -> Sequence[str]:
        return [self.text, self.label] + ([] if self.group is None else [self.group])

    def check(self) -> None:
        seen: dict[str, tuple[int, str]] = {}  # label and place of each text
        for row in self.rows:
            label, text = read_label(row, self.label), row.text(self.text)
            before, where = seen.setdefault(normal(text), (label, row.where))
            if before != label:
                raise DataError(
                    f"{row.where}: the text of {where} stands here again with the other label, {text[:60]!r}: keep one."
                )

    def groups(self) -> list[int]:
        column = self.group or "group"
        if not self.has(column):
            return numbered([normal(row.text(self.text)) for row in self.rows])
        return numbered([_group(row, column) for row in self.rows])

    def encode(self, row: Row, kind: Kind) -> list[Example]:
        label = read_label(row, self.label)
        if kind == "answers" and not label:
            return []
        example = self.continued("", row.text(self.text), learnt=kind == "answers")
        example["label"] = label
        return [example]


def read_label(row: Row, column: str) -> int:
    """Return 1 or 0, whatever a file has for them.

    Raises:
        DataError: it has anything else.

    Example:
        >>> [read_label(Row({"label": value}, "my.csv, row 1"), "label") for value in (1, "yes", False, "0")]
        [1, 1, 0, 0]
    """
    value: Any = row.values.get(column)
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        given = "missing" if value is None or value == "" else repr(value)
        raise DataError(
            f"{row.where}: {column!r} is {given}, but must be 1, true or yes for a text that is wanted, and 0, false "
            "or no for one that is not."
        )
    return label


def _group(row: Row, column: str) -> str:
    value: Any = row.values.get(column)
    if value is None or isinstance(value, list | dict) or not str(value).strip():
        raise DataError(f"{row.where}: {column!r} must say which texts this one belongs to, got {value!r}.")
    return str(value).strip()
