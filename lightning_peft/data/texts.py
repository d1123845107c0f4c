"""Plain texts, for language modelling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from lightning_peft.data.files import Row
from lightning_peft.data.row_data import Example, Kind, RowData, normal, numbered
from lightning_peft.data.row_options import RowOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Texts(RowData):
    """Texts of which every token but the first is learnt, with an end token behind each.

    A text longer than `max_length` becomes several rows of one group, each of which begins with the last token of the
    one before it, so that every token is learnt once. `prompt_end` is 0: there is no prompt.

    Args:
        path: see `RowData`.
        tokenizer: see `RowData`.
        text: the column of the texts.
        **options: see `RowOptions`; `max_length` is the tokens of a row, at least 2; default, a text is one row.

    Example:
        >>> data = Texts("package:politeness", text="positive")
        >>> data.prepare_data()
        >>> len(data.rows)
        60
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        text: str = "text",
        **options: Unpack[RowOptions],
    ) -> None:
        if options.get("max_length") == 1:
            raise ValueError("max_length must be at least 2, since the first token of a row is predicted from nothing.")
        super().__init__(path, tokenizer, **options)
        self.text = text

    def columns(self) -> Sequence[str]:
        return [self.text]

    def check(self) -> None:
        for row in self.rows:
            row.text(self.text)

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if self.encoder_decoder:
            raise ValueError("Texts are for causal language models: an encoder-decoder has no next token of a text.")

    def groups(self) -> list[int]:
        return numbered([normal(row.text(self.text)) for row in self.rows])

    def encode(self, row: Row, kind: Kind) -> list[Example]:
        ids = list(self.encoder(row.text(self.text))["input_ids"])
        end = self.encoder.eos_token_id
        if isinstance(end, int) and ids[-1:] != [end]:
            ids.append(end)
        if len(ids) < 2:
            raise ValueError(f"the text {row.text(self.text)!r} has {len(ids)} token, so that there is none to learn.")
        size = self.max_length or len(ids)
        parts = [ids[first : first + size] for first in range(0, len(ids) - 1, size - 1)]
        return [{"input_ids": part, "labels": [-100, *part[1:]], "prompt_end": 0, "group": 0} for part in parts]
