"""Labelled texts as a comparison tests them: every text has a number, and a test set may be named."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Literal

from torch.utils.data import DataLoader

from lightning_peft.data.batches import LengthGroupedSampler
from lightning_peft.data.files import Row, check_columns, read_rows
from lightning_peft.data.labelled_text import LabelledText
from lightning_peft.data.row_data import Example, Kind
from lightning_peft.files.data_error import DataError


class ClassificationData(LabelledText):
    """Labelled texts whose batches have `unit [B]`, the number of each row, counted from 0.

    Args:
        path: see `RowData`.
        test_path: the file of a test set; its rows are counted behind those of `path`.
        test_split: a column and the value that rows of the test set have there.
        **options: see `LabelledText` and `RowOptions`.

    Attributes:
        tested: of each row, whether it is of the test set that was named.
        size: how many texts are learnt from; None for all.
        order_seed: of the order of training batches, and of which texts `size` takes.
    """

    def __init__(
        self,
        path: str,
        test_path: str | None = None,
        test_split: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, **options)
        self.test_path, self.test_split = test_path, None if test_split is None else dict(test_split)
        self.tested: list[bool] = []
        self.size: int | None = None
        self.order_seed = 0

    def columns(self) -> list[str]:
        return [*super().columns(), *(self.test_split or ())]

    def contents(self) -> list[list[Any]]:
        """Return each row's texts, its class and whether it is of the test set, after `prepare_data`."""
        tested = self.tested or [False] * len(self.rows)
        return [[*self._texts(row), self._name(row), own] for row, own in zip(self.rows, tested, strict=True)]

    def read_rows(self) -> list[Row]:
        rows = super().read_rows()
        self.tested = []
        if self.test_split is not None:
            ((column, value),) = self.test_split.items()
            check_columns(rows, [column], self.path)
            self.tested = [str(row.values.get(column)) == value for row in rows]
            if not any(self.tested) or all(self.tested):
                what = "every row" if all(self.tested) else "no row"
                raise DataError(f"{self.path} has {value!r} as {column!r} in {what}: a test set is a part of the rows.")
        if self.test_path is not None:
            own = read_rows(self.test_path)
            check_columns(own, self.columns(), self.test_path)
            self.tested = [False] * len(rows) + [True] * len(own)
            rows = rows + own
        return rows

    def examples(self, part: Literal["train", "val", "test"], kind: Kind) -> list[Example]:
        """Return a part's examples; those that are only measured are sorted by length, to be padded little."""
        made = super().examples(part, kind)
        return made if part == "train" else sorted(made, key=lambda example: len(example["input_ids"]))

    def train_dataloader(self) -> DataLoader:
        examples = self.examples("train", self.train_kind())
        lengths = [len(example["input_ids"]) for example in examples]
        return self._loader(examples, LengthGroupedSampler(lengths, self.batch_size, self.order_seed))

    def _encoded(self, number: int, kind: Kind) -> list[Example]:
        return [{**example, "unit": number} for example in super()._encoded(number, kind)]

    def _divided(self) -> dict[str, list[int]]:
        parts = self._by_test_set() if self.tested else super()._divided()
        if self.size is not None:
            train = sorted({self._group[number] for number in parts["train"]})
            kept = set(random.Random(self.order_seed).sample(train, len(train))[: self.size])
            parts["train"] = [number for number in parts["train"] if self._group[number] in kept]
        return parts

    def _by_test_set(self) -> dict[str, list[int]]:
        """Return the test set, and the rows whose texts are not in it, some of them held out for validation."""
        numbers = range(len(self.rows))
        test = {self._group[number] for number in numbers if self.tested[number]}
        rest = self._shuffled(sorted(set(self._group) - test), self.seed + 1)
        count = max(1, round(self.val_fraction * len(rest)))
        if count >= len(rest):
            raise DataError(f"{self.path} has {len(rest)} texts to learn from, of which {count} would be held out.")
        val, train = set(rest[:count]), set(rest[count:])
        parts = {"train": train, "val": val}
        divided = {name: [n for n in numbers if self._group[n] in groups] for name, groups in parts.items()}
        inner = self._fold is not None and self._fold.inner
        return divided | {"test": divided["val"] if inner else [n for n in numbers if self.tested[n]]}
