"""Chats to tune on, with the loss on what the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from lightning_peft.data.chat_template import assistant_rows, check_template, prompt_text
from lightning_peft.data.files import Row
from lightning_peft.data.messages import Message, read_messages
from lightning_peft.data.row_data import Example, Kind, RowData, normal, numbered
from lightning_peft.data.row_options import RowOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MESSAGES = ("messages", "conversations", "conversation")  # the columns of chats, by OpenAI and by ShareGPT


class Chats(RowData):
    """Chats through the tokenizer's chat template, with the loss on the assistant's tokens alone.

    A row is a chat, in a column of messages, or a prompt and its target. `labels [B, T]` are the assistant's tokens
    with those that end its turns, so that a tuned model, asked through the template, writes and stops as it has learnt;
    `prompt_end [B]` is the last token of the first generation prompt. A chat is one row of a batch, or one for each of
    the assistant's turns where the template writes earlier turns otherwise than it asks for them; see
    `chat_template.assistant_rows`.

    A chat that is longer than `max_length` is left out, never cut: cut at its beginning it would lose the system's
    message and the template's first tokens, cut at its end the token that it should learn to stop with.

    Args:
        path: see `RowData`.
        tokenizer: see `RowData`; it must have a chat template.
        messages: the column of the chats: lists of messages with `role` and `content`, or with `from` and `value`.
            Default: `"messages"`, `"conversations"` or `"conversation"`, where the file has one.
        prompt: the column of the user's texts, where the file has no chats.
        target: the column of the answers to them.
        system: a message of the system's for chats that have none of their own.
        **options: see `RowOptions`; chats that begin alike are one group, and one longer than `max_length` is left out.

    Example:
        >>> data = Chats("package:chats")
        >>> data.prepare_data()
        >>> len(data.rows), [message["role"] for message in data.chat(data.rows[1])]
        (50, ['user', 'assistant'])
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        messages: str | None = None,
        prompt: str = "prompt",
        target: str = "target",
        system: str | None = None,
        **options: Unpack[RowOptions],
    ) -> None:
        super().__init__(path, tokenizer, **options)
        self.messages, self.prompt_column, self.target, self.system = messages, prompt, target, system

    def columns(self) -> Sequence[str]:
        column = self._chat_column()
        return [self.prompt_column, self.target] if column is None else [column]

    def chat(self, row: Row) -> list[Message]:
        """Return a row as messages, of which the last is the assistant's.

        Args:
            row: one of `rows`.

        Raises:
            DataError: it is no chat; see `read_messages`.
        """
        column = self._chat_column()
        if column is None:
            turns = [("user", row.text(self.prompt_column)), ("assistant", row.text(self.target))]
            messages = [{"role": role, "content": text} for role, text in turns]
        else:
            messages = read_messages(row.values.get(column), row.where)
        if self.system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def check(self) -> None:
        for row in self.rows:
            self.chat(row)

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        check_template(self.encoder)
        if self.encoder_decoder:
            raise ValueError("Chats are for causal language models: an encoder-decoder has no turns of a chat.")

    def groups(self) -> list[int]:
        first = (next(m["content"] for m in self.chat(row) if m["role"] == "user") for row in self.rows)
        return numbered([normal(text) for text in first])

    def prompt(self, row: Row) -> str:
        return prompt_text(self.encoder, self.chat(row)[:-1])

    def encode(self, row: Row, kind: Kind) -> list[Example]:
        examples: list[Example] = []
        for ids, mask in assistant_rows(self.encoder, self.chat(row)):
            labels = [token if learnt else -100 for token, learnt in zip(ids, mask, strict=True)]
            examples.append({"input_ids": ids, "labels": labels, "prompt_end": mask.index(True) - 1, "group": 0})
        return examples

    def _chat_column(self) -> str | None:
        """Return the column of messages; None where rows are prompts with targets."""
        if self.messages is not None:
            return self.messages
        return next((column for column in _MESSAGES if self.has(column)), None)
