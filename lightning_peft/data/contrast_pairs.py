"""Pairs of texts that differ in what is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

from lightning_peft.data.files import Row
from lightning_peft.data.row_data import Example, Kind, RowData, check_kind, normal
from lightning_peft.data.row_options import RowOptions
from lightning_peft.files.data_error import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ContrastPairs(RowData):
    """Pairs of a text that is wanted and one that is not, perhaps behind a prompt: what CAA and RepE compare.

    Each pair is a group of two statements, label 1 for the positive and 0 for the negative one. A method that is
    trained learns the positive ones.

    Args:
        path: see `RowData`.
        tokenizer: see `RowData`.
        positive: the column of the text that is wanted.
        negative: the column of the text that is not.
        prompt: the column of what both answer. Default: `"prompt"` where the file has it.
        chat: whether a prompt is a user's turn in the tokenizer's chat template, behind which the assistant begins with
            the text; default, where the tokenizer has one. Otherwise a prompt and a text are joined by a space.
        train: `"statements"`: training batches hold both texts of each pair, and nothing to learn by gradient;
            `"answers"`: the positive ones, to tune on. Default: statements where the Trainer computes an edit, else
            answers.
        **options: see `RowOptions`; a pair with a text longer than `max_length` is left out.

    Example:
        >>> data = ContrastPairs("package:politeness", val_fraction=0.25)
        >>> data.prepare_data()
        >>> len(data.rows)
        60
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        positive: str = "positive",
        negative: str = "negative",
        prompt: str | None = None,
        chat: bool | None = None,
        train: Kind | None = None,
        **options: Unpack[RowOptions],
    ) -> None:
        check_kind(train)
        super().__init__(path, tokenizer, **options)
        self.positive, self.negative, self.prompt_column = positive, negative, prompt
        self.chat, self.kind = chat, train

    def columns(self) -> Sequence[str]:
        return [self.positive, self.negative] + ([] if self.prompt_column is None else [self.prompt_column])

    def check(self) -> None:
        for row in self.rows:
            if normal(row.text(self.positive)) == normal(row.text(self.negative)):
                raise DataError(
                    f"{row.where}: {self.positive!r} and {self.negative!r} are the same text, "
                    f"{row.text(self.positive)[:60]!r}, so that there is nothing to compare."
                )
            self._raw_prompt(row)

    def prompt(self, row: Row) -> str | None:
        raw = self._raw_prompt(row)
        return self.chat_prompt(raw.strip(), self.chat) if raw.strip() else None

    def encode(self, row: Row, kind: Kind) -> list[Example]:
        prompt = self.prompt(row)
        raw = self._raw_prompt(row)
        space = ""
        if prompt is not None and prompt == raw.strip():  # not a turn of a chat
            space = raw[len(raw.rstrip()) :] or " "
        examples = []
        for label, column in ((1, self.positive), (0, self.negative)):
            if kind == "statements" or label:
                example = self.continued(prompt or "", space + row.text(column), learnt=kind == "answers")
                example["label"] = label
                examples.append(example)
        return examples

    def _raw_prompt(self, row: Row) -> str:
        """Return a row's prompt as the file has it, `""` where it has none."""
        value: Any = row.values.get(self.prompt_column or "prompt")
        if value is not None and not isinstance(value, str):
            raise DataError(f"{row.where}: {self.prompt_column or 'prompt'!r} must be a text, got {value!r}.")
        return value or ""
