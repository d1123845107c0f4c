"""Questions with right and wrong answers, A/B behaviour sets among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft.data.batches import as_dataset
from lightning_peft.data.files import Row
from lightning_peft.data.row_data import Example, Kind, RowData, check_kind, normal, numbered
from lightning_peft.data.row_options import RowOptions
from lightning_peft.files.data_error import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEHAVIOUR = ("answer_matching_behavior", "answer_not_matching_behavior")  # the columns of A/B behaviour sets


class Choices(RowData):
    """Questions with right and wrong answers: to tune on, to compute edits from, to score.

    A method that is trained learns the right answers. Edits read each question with each answer, label 1 for right
    ones; a question is a group. Under `use_split`, which a `ChoiceTask` calls, a test batch holds whole questions, and
    each of its rows is an answer, `right [B]`; otherwise `test` measures the loss on the right answers.

    In A/B behaviour sets the question names the answers, "(A) … (B) …", and the columns are
    `answer_matching_behavior` and `answer_not_matching_behavior`, such as "(A)" and "(B)"; they are read as they are.

    Args:
        path: see `RowData`.
        tokenizer: see `RowData`.
        question: the column of the question.
        right: the column of the right answers, or several. A value is one answer, a list of them, or a text in which
            they stand between `|` or on lines of their own. Default: `"right"`, or `"answer_matching_behavior"` where
            the file has it.
        wrong: the same of the wrong answers. Default: `"wrong"`, or `"answer_not_matching_behavior"`.
        template: what stands before an answer where the question is no turn of a chat; `{question}` stands for it.
        chat: whether a question is a user's turn in the tokenizer's chat template, behind which the assistant begins
            with the answer; default, where the tokenizer has one.
        train: `"statements"`: training batches hold each question with each answer, and nothing to learn by gradient;
            `"answers"`: with each right one, to tune on. Default: statements where the Trainer computes an edit, else
            answers.
        units_per_batch: questions of a test batch, under `use_split`.
        **options: see `RowOptions`; a question with a text longer than `max_length` is left out.

    Example:
        >>> data = Choices("package:ab_questions")
        >>> data.prepare_data()
        >>> len(data.rows), data.answers(data.rows[0], 1) in (["(A)"], ["(B)"])
        (40, True)
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        question: str = "question",
        right: str | list[str] | None = None,
        wrong: str | list[str] | None = None,
        template: str = "{question}\nAnswer:",
        chat: bool | None = None,
        train: Kind | None = None,
        units_per_batch: int = 8,
        **options: Unpack[RowOptions],
    ) -> None:
        check_kind(train)
        if "{question}" not in template:
            raise ValueError(f"template must say where the question stands, as {{question}}, got {template!r}.")
        if units_per_batch < 1:
            raise ValueError(f"units_per_batch must be at least 1, got {units_per_batch}.")
        super().__init__(path, tokenizer, **options)
        self.question, self.template, self.chat, self.kind = question, template, chat, train
        self.right, self.wrong = right, wrong
        self.units_per_batch = units_per_batch

    def columns(self) -> Sequence[str]:
        return [self.question, *self._answer_columns(1), *self._answer_columns(0)]

    def answers(self, row: Row, right: int) -> list[str]:
        """Return a row's right answers, or its wrong ones, each once.

        Args:
            row: one of `rows`.
            right: 1 or 0.

        Raises:
            DataError: there is none, or one is no text.
        """
        columns = self._answer_columns(right)
        texts = [text for column in columns for text in _texts(row, column)]
        if not texts:
            raise DataError(f"{row.where}: {' and '.join(map(repr, columns))} has no answer.")
        return list(dict.fromkeys(texts))

    def check(self) -> None:
        seen: dict[tuple[str, str], tuple[int, str]] = {}  # whether an answer to a question is right, and where
        for row in self.rows:
            for right in (1, 0):
                for answer in self.answers(row, right):
                    key = normal(row.text(self.question)), normal(answer)
                    before, where = seen.setdefault(key, (right, row.where))
                    if before != right:
                        here, there = ("right", "wrong") if right else ("wrong", "right")
                        both = "both right and wrong" if where == row.where else f"{here} here and {there} in {where}"
                        raise DataError(f"{row.where}: the answer {answer!r} is {both}.")

    def groups(self) -> list[int]:
        return numbered([normal(row.text(self.question)) for row in self.rows])

    def prompt(self, row: Row) -> str:
        question = row.text(self.question)
        prompt = self.chat_prompt(question, self.chat)
        if prompt != question:
            return prompt
        before, behind = self.template.split("{question}", 1)
        # many sets end their questions so already
        return before + question.removesuffix(behind.strip()).rstrip() + behind

    def encode(self, row: Row, kind: Kind) -> list[Example]:
        return self._continued(row, (1, 0) if kind == "statements" else (1,), learnt=kind == "answers", end=True)

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        if self._fold is None:
            return super().test_dataloader()
        by_question: dict[int, list[int]] = {}
        for number in self._parts["test"]:
            by_question.setdefault(self._group[number], []).append(number)
        units = list(by_question.values())
        parts = [units[i : i + self.units_per_batch] for i in range(0, len(units), self.units_per_batch)]
        batches = [self._choices([number for unit in part for number in unit]) for part in parts]
        return DataLoader(as_dataset(batches), batch_size=None, num_workers=self.num_workers)

    def _choices(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Return the batch of all answers to some questions."""
        examples: dict[tuple[int, tuple[int, ...]], Example] = {}  # each answer once, where rows share a question
        for number in numbers:
            for example in self._continued(self.rows[number], (1, 0), learnt=True, end=False):
                example["group"] = self._group[number]
                examples.setdefault((example["group"], tuple(example["input_ids"])), example)
        batch = self.collate(list(examples.values()))
        return batch | {"right": batch["label"].clone()}

    def _continued(self, row: Row, sides: Sequence[int], learnt: bool, end: bool) -> list[Example]:
        """Return a question with its answers; `end`: where one is learnt as a turn of a chat, with its end token."""
        prompt = self.prompt(row)
        plain = not self.encoder.chat_template or self.chat is False
        examples = []
        for right in sides:
            for answer in self.answers(row, right):
                if plain or self.encoder_decoder:
                    example = self.continued(prompt, (" " if plain else "") + answer, learnt)
                else:
                    example = self.as_turn(row.text(self.question), answer, learnt, end and learnt)
                example["label"] = right
                examples.append(example)
        return examples

    def _answer_columns(self, right: int) -> list[str]:
        given = self.right if right else self.wrong
        if given is None:
            name = "right" if right else "wrong"
            behaviour = _BEHAVIOUR[1 - right]
            return [behaviour if not self.has(name) and self.has(behaviour) else name]
        return [given] if isinstance(given, str) else list(given)


def _texts(row: Row, column: str) -> list[str]:
    """Return the answers that a column holds."""
    value: Any = row.values.get(column)
    if isinstance(value, str):
        value = re.split(r"[|\n]", value)
    elif value is None:
        value = []
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = [str(value)]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DataError(f"{row.where}: {column!r} must be a text or a list of texts, got {row.values[column]!r}.")
    return [text.strip() for text in value if text.strip()]
