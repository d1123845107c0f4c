"""A check that a training batch holds the keys a callback learns from, made on the batch itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_HOW = {
    "input_ids": 'the tokens [B, T], `tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]`',
    "label": "`torch.tensor([1, 0, …])`, 1 for each text that is wanted (true) and 0 for each that is not",
    "group": "`torch.tensor([0, 0, 1, …])`, the same number for texts that belong together, as to one question",
}
_FORMER = {"label": "truth", "group": "question_id"}  # what the keys were called in 0.1


def check_keys(method: str, keys: Sequence[str], batch: Any, meanings: Mapping[str, str] | None = None) -> None:
    """Raise `ValueError` where a batch lacks a key, in one sentence that shows how to make it.

    Args:
        method: the name of the method that needs the keys.
        keys: the keys it needs.
        batch: a training batch.
        meanings: of keys with names of the user's own, what they stand for: `"label"` or `"group"`.
    """
    # a tokenizer's BatchEncoding has keys and is no dict; a tensor and a list have none
    missing = [key for key in keys if not hasattr(batch, "keys") or key not in batch]
    if missing:
        how = "; ".join(filter(None, (_how(key, (meanings or {}).get(key, key), batch) for key in missing)))
        raise ValueError(
            f"{method} needs {', '.join(keys)}, but the training batch has no {' and no '.join(missing)}"
            f"{f': {how}' if how else ''}."
        )


def labels_and_groups(method: str, batch: Mapping[str, Any], label_key: str, group_key: str) -> tuple[Tensor, Tensor]:
    """Return a batch's labels, 0 or 1, and groups, integers, `[B]` each.

    Args:
        method: the name of the method that reads them.
        batch: a training batch.
        label_key: the key of the labels.
        group_key: the key of the groups.

    Raises:
        ValueError: one of the two is not one integer a row, or a label is neither 0 nor 1.
    """
    rows = len(batch["input_ids"])
    label, group = (_integers(method, batch[key], key, rows) for key in (label_key, group_key))
    check_labels(method, label, label_key)
    return label, group


def check_labels(method: str, label: Tensor, name: str = "label") -> None:
    """Raise `ValueError` where a label is neither 0 nor 1.

    Args:
        method: the name of the method that reads them.
        label: `[N]`.
        name: what the labels are called.
    """
    values = sorted(set(label.tolist()))
    if not {0, 1} >= set(values):
        few = f"{', '.join(map(str, values[:5]))}{', …' if len(values) > 5 else ''}"
        raise ValueError(
            f"{method} reads {name} as 1 (wanted, true) or 0 (not), got {few}: make them so, or name the key "
            "that holds such labels with label_key."
        )


def check_learnable(method: str, batch: Any, loss: Tensor) -> None:
    """Raise `ValueError` where a loss is not a number because every label of its batch is -100.

    Args:
        method: the name of the method that is trained.
        batch: a training batch.
        loss: its loss.
    """
    labels = batch["labels"] if hasattr(batch, "keys") and "labels" in batch else None
    if isinstance(labels, Tensor) and not torch.isfinite(loss).all() and (labels == -100).all():
        raise ValueError(
            f"{method} has nothing to learn from the training batch, in which all labels are -100: let labels be the "
            "tokens of the answers, and -100 elsewhere; batches made for edits, say, have none."
        )


def _how(key: str, meaning: str, batch: Any) -> str | None:
    """Return how a key that a batch lacks is made, or renamed where the batch has it as 0.1 called it."""
    former = _FORMER.get(meaning)
    if former is not None and hasattr(batch, "keys") and former in batch:
        return (
            f'what was {former!r} is {key!r} now, so rename it, `batch["{key}"] = batch.pop("{former}")`, or give '
            f'{meaning}_key="{former}"'
        )
    return f"{key} is {_HOW[meaning]}" if meaning in _HOW else None


def _integers(method: str, values: Any, key: str, rows: int) -> Tensor:
    """Return a batch's values as they are, if they are one integer a row."""
    if isinstance(values, Tensor) and values.shape == (rows,) and not values.is_complex():
        whole = values.long()
        if torch.equal(whole.to(values.dtype), values):
            return whole
    given = f"{list(values.shape)}, {values.dtype}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
    raise ValueError(
        f"{method} reads {key} as a tensor of integers, one a row of the training batch, got {given} for {rows} rows."
    )
