"""A check that a training batch holds the keys a callback learns from, made on the batch itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_HOW = {
    "input_ids": 'the tokens [B, T], `tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]`',
    "truth": "`torch.tensor([1, 0, …])`, 1 for each text that is wanted (true) and 0 for each that is not",
    "question_id": "`torch.tensor([0, 0, 1, …])`, the same number for texts that belong together, as to one question",
}


def check_keys(method: str, keys: Sequence[str], batch: Any) -> None:
    """Raise `ValueError` where a batch lacks a key, in one sentence that shows how to make it.

    Args:
        method: the name of the method that needs the keys.
        keys: the keys it needs.
        batch: a training batch.
    """
    # a tokenizer's BatchEncoding has keys and is no dict; a tensor and a list have none
    missing = [key for key in keys if not hasattr(batch, "keys") or key not in batch]
    if missing:
        how = "; ".join(f"{key} is {_HOW[key]}" for key in missing if key in _HOW)
        raise ValueError(
            f"{method} needs {', '.join(keys)}, but the training batch has no {' and no '.join(missing)}"
            f"{f': {how}' if how else ''}."
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
            'tokens of the answers, as `TruthfulQADataModule(train="answers")` does.'
        )
