"""The ends of a batch's prompts: the field `prompt_end`, checked against what else the batch says, or its labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_FORMER = "answer_start"


def mentions_answers(batch: Any) -> bool:
    """Return whether a batch has the field, by its present or its former name, or labels of its tokens."""
    if not isinstance(batch, Mapping):
        return False
    return "prompt_end" in batch or _FORMER in batch or token_labels(batch) is not None


def token_labels(batch: Any) -> Tensor | None:
    """Return a batch's `labels [B, T]`, -100 outside the answers; None without one for each of its tokens.

    Example:
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> token_labels({"input_ids": ids, "labels": torch.tensor([[-100, 6, 7]])})
        tensor([[-100,    6,    7]])
        >>> token_labels({"input_ids": ids, "labels": torch.tensor([1])})  # classes of texts
    """
    if not isinstance(batch, Mapping):
        return None
    labels, tokens = batch.get("labels"), batch.get("input_ids")
    if not isinstance(labels, Tensor) or not isinstance(tokens, Tensor) or labels.is_floating_point():
        return None
    return labels if labels.dim() == 2 and labels.shape == tokens.shape else None


def prompt_end(batch: Any) -> Tensor | None:
    """Return the position ids of the last prompt tokens, `[B]`, or None where a batch does not hold them.

    Args:
        batch: whatever a data loader gives; a mapping may have `prompt_end [B]` beside `input_ids [B, T]`,
            `attention_mask [B, T]`, `position_ids [B, T]` and `labels [B, T]` (-100 outside the answer).

    Raises:
        ValueError: the batch has the field by its former name, it is no integer a row, one lies outside its row, or
            the labels begin elsewhere.

    Example:
        >>> ids, labels = torch.tensor([[5, 6, 7]]), torch.tensor([[-100, -100, 7]])
        >>> prompt_end({"input_ids": ids, "labels": labels, "prompt_end": torch.tensor([1])})
        tensor([1])
        >>> prompt_end({"input_ids": ids, "labels": labels, "prompt_end": torch.tensor([0])})
        Traceback (most recent call last):
        ValueError: prompt_end is 0 in row 0, but its labels begin after position 1: leave one of the two out.
    """
    if not isinstance(batch, Mapping):
        return None
    if _FORMER in batch:
        raise ValueError(
            f"The batch has a field {_FORMER!r}, which an adapter limited to positions no longer reads: name it "
            "'prompt_end' if it holds the position ids of the last prompt tokens, else leave it out."
        )
    ends = batch.get("prompt_end")
    if ends is None:
        return None
    if not isinstance(ends, Tensor) or ends.dim() != 1 or ends.is_floating_point():
        shape = f"of shape {list(ends.shape)}, {ends.dtype}" if isinstance(ends, Tensor) else type(ends).__name__
        raise ValueError(f"prompt_end must be a tensor of integers, one a row of the batch, got one that is {shape}.")
    tokens = batch.get("input_ids")
    if isinstance(tokens, Tensor) and tokens.dim() == 2:
        _check(ends, tokens, batch)
    return ends


def _check(ends: Tensor, tokens: Tensor, batch: Mapping[str, Any]) -> None:
    """Raise `ValueError` where an end lies outside its row or the labels begin elsewhere."""
    if len(ends) != len(tokens):
        raise ValueError(f"prompt_end has {len(ends)} values for {len(tokens)} rows of input_ids; give one a row.")
    mask, places, labels = (batch.get(name) for name in ("attention_mask", "position_ids", "labels"))
    real = mask.bool() if isinstance(mask, Tensor) and mask.shape == tokens.shape else torch.ones_like(tokens).bool()
    if not isinstance(places, Tensor) or places.shape != tokens.shape:
        places = (real.long().cumsum(-1) - 1).clamp(min=0)
    last, ends = places.masked_fill(~real, -1).amax(-1), ends.to(tokens.device)
    if (outside := ((ends < 0) | (ends > last)).nonzero()).numel():
        row = int(outside[0])
        raise ValueError(
            f"prompt_end is {int(ends[row])} in row {row}, whose tokens have the positions 0 to {int(last[row])}: give "
            "the position id of the last prompt token."
        )
    if not isinstance(labels, Tensor) or labels.shape != tokens.shape:
        return
    answered = labels != -100
    before = places.gather(1, (answered.long().argmax(-1, keepdim=True) - 1).clamp(min=0)).squeeze(1)
    if (odd := (answered.any(-1) & (ends != before)).nonzero()).numel():
        row = int(odd[0])
        raise ValueError(
            f"prompt_end is {int(ends[row])} in row {row}, but its labels begin after position {int(before[row])}: "
            "leave one of the two out."
        )
