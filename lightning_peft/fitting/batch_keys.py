"""A check that a training batch holds the keys a callback learns from, made on the batch itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_HOW = {
    "attention_mask": "a tensor [B, T], 1 for each token of a text and 0 for padding",
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
    check_tokens(method, batch)
    rows, names = len(batch["input_ids"]), {"label": label_key, "group": group_key}
    label, group = (column(method, batch[key], meaning, rows, key) for meaning, key in names.items())
    return label, group


def check_tokens(method: str, batch: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless a batch's texts are rows of token ids, each with a token that its mask counts.

    Args:
        method: the name of the method that reads them.
        batch: a training batch, with `input_ids` and perhaps `attention_mask`.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    for name, values in {"input_ids": ids, "attention_mask": mask}.items():
        if values is None and name == "attention_mask":
            continue
        if not isinstance(values, Tensor) or values.dim() != 2 or not _is_whole(values):
            raise ValueError(f"{method} needs {name} as {_HOW[name]}, got {_given(values)}.")
    if mask is None:
        return
    if mask.shape != ids.shape:
        raise ValueError(
            f"{method} reads an attention_mask of {list(mask.shape)} with input_ids of {list(ids.shape)}: give one "
            "number a token."
        )
    if len(empty := (mask == 0).all(-1).nonzero()):
        raise ValueError(
            f"{method} finds no token in row {int(empty[0])} of a training batch, where attention_mask is 0 "
            "throughout: leave such texts out."
        )


def check_vocabulary(method: str, backbone: nn.Module, input_ids: Tensor) -> None:
    """Raise `ValueError` for a token id that a model does not know.

    Args:
        method: the name of the method that reads the tokens.
        backbone: a transformers model; of any other module nothing is known.
        input_ids: `[B, T]`.
    """
    try:
        size = getattr(getattr(backbone, "get_input_embeddings", lambda: None)(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):  # transformers models whose inputs are not tokens
        return
    if isinstance(size, int) and input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < size:
        raise ValueError(
            f"{method} reads token ids from {int(input_ids.min())} to {int(input_ids.max())}, but the model knows 0 to "
            f"{size - 1}: encode the texts with the model's own tokenizer."
        )


def column(method: str, values: Any, meaning: str, rows: int, key: str | None = None) -> Tensor:
    """Return labels or groups as integers `[N]`.

    Args:
        method: the name of the method that reads them.
        values: a tensor of a batch, or a list, one value a text.
        meaning: `"label"`, each 1 or 0, or `"group"`.
        rows: how many texts there are.
        key: what they are called; default, what they mean.

    Raises:
        ValueError: they are not one whole number a text, or a label is neither 0 nor 1.
    """
    key = key or meaning
    if not isinstance(values, Tensor) and _are_numbers(values):
        values = torch.as_tensor(values)
    whole = isinstance(values, Tensor) and values.shape == (rows,) and _is_whole(values)
    if not whole:
        several = isinstance(values, Tensor) and values.shape == (rows, 1)
        how = f"give `{key}.squeeze(1)`" if several else f"{key} is {_HOW[meaning]}"
        raise ValueError(
            f"{method} reads {key} as a tensor of integers, one a row of the training batch, got {_given(values)} for "
            f"{rows} rows: {how}."
        )
    if meaning == "label":
        check_labels(method, values.long(), key)
    return values.long()


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


def _are_numbers(values: Any) -> bool:
    """Return whether a list, or an array, holds numbers alone."""
    listed = values.tolist() if hasattr(values, "tolist") else values
    return isinstance(listed, list | tuple) and all(isinstance(value, int | float) for value in listed)


def _is_whole(values: Tensor) -> bool:
    """Return whether a tensor's values are integers, of whatever type."""
    return not values.is_complex() and torch.equal(values.long().to(values.dtype), values)


def _given(values: Any) -> str:
    """Return what an error message says of values that are of no use."""
    if isinstance(values, Tensor):
        odd = values[values != values.round()] if values.is_floating_point() else values[:0]
        return f"{list(values.shape)}, {values.dtype}" + (f", {float(odd[0]):g} among them" if len(odd) else "")
    first = next(iter(values), None) if isinstance(values, list | tuple) else None
    return f"a {type(values).__name__}" + (f" of texts such as {first!r}" if isinstance(first, str) else "")
