"""Rows of tokens as batches, padded on the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_batches(
    rows: Sequence[Sequence[int] | Tensor], padding: int = 0, batch_size: int = 8
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of rows: `input_ids` and `attention_mask [B, T]`, and `document [B]`, the rows' numbers.

    Args:
        rows: the tokens of each text.
        padding: the token to pad with; none of what is measured depends on it.
        batch_size: rows of a batch.

    Example:
        >>> [batch] = token_batches([[5, 6, 7], [8, 9]])
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["document"].tolist()
        ([[5, 6, 7], [8, 9, 0]], [[1, 1, 1], [1, 1, 0]], [0, 1])
    """
    for start in range(0, len(rows), batch_size):
        ids = [torch.as_tensor(row, dtype=torch.long) for row in rows[start : start + batch_size]]
        yield {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "document": torch.arange(start, start + len(ids)),
        }


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that a tokenizer pads with; else the one that ends a text, else 0."""
    tokens = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in tokens if isinstance(token, int)), 0)
