"""A hash for each row of a call, by its arguments: equal rows have equal hashes, however they are padded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# what transformers models take and read above their blocks only; of another shape or value in every batch
_READ_ABOVE = frozenset({"logits_to_keep", "num_items_in_batch", "return_dict"})


class NotHashable(TypeError):
    """An argument is neither a tensor nor a plain value, nor made of such."""


def row_keys(arguments: Mapping[str, Any], rows: int, real: Tensor | None, context: bytes = b"") -> list[bytes]:
    """Return one hash for each row.

    Args:
        arguments: the call's arguments by name: tensors, plain values, and lists or dicts of them.
        rows: the number of rows; a tensor with as many, or one of one row as long as `real`, is taken row by row, any
            other belongs to every row.
        real: `[rows, T]` bool, what is not padding; of tensors `[rows, T, ...]` the rest is left out. Where no
            position ids are given, the places of a row's tokens belong to its hash, since a model may count from them.
        context: belongs to every row.

    Raises:
        NotHashable: an argument is something else, such as a cache of keys and values.

    Example:
        >>> left, right = torch.tensor([[0, 5, 6]]), torch.tensor([[5, 6, 0]])
        >>> positions = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 0]])
        >>> [a], [b] = (row_keys({"input_ids": ids, "position_ids": p}, 1, ids != 0)
        ...             for ids, p in zip((left, right), positions))
        >>> a == b
        True
    """
    shared = hashlib.blake2b(context, digest_size=16)
    split: list[tuple[str, Tensor]] = []
    if real is not None:
        real = real.cpu()
        if arguments.get("position_ids") is None:
            split.append(("places", torch.arange(real.shape[1]).expand(real.shape)))
    for name, value in _flat(arguments):
        if isinstance(value, Tensor) and (rowwise := _by_row(value.detach(), rows, real)) is not None:
            split.append((name, rowwise.cpu()))
        elif isinstance(value, Tensor):
            shared.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            shared.update(_bytes(value.detach().cpu()))
        else:
            shared.update(f"{name} {value!r}".encode())
    keys = []
    for row in range(rows):
        row_hash = shared.copy()
        for name, tensor in split:
            part = tensor[row]
            if real is not None and tensor.shape[:2] == real.shape:
                part = part[real[row]]
            row_hash.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
            row_hash.update(_bytes(part))
        keys.append(row_hash.digest())
    return keys


def _flat(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield tensors and plain values by a name of their own, in a fixed order; None is left out."""
    for name in sorted(arguments, key=str):
        value = arguments[name]
        if name in _READ_ABOVE or value is None:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield from _flat({str(i): item for i, item in enumerate(value)}, f"{prefix}{name}.")
        elif isinstance(value, Tensor | bool | int | float | str | torch.dtype):
            yield f"{prefix}{name}", value
        else:
            raise NotHashable(name)


def _by_row(tensor: Tensor, rows: int, real: Tensor | None) -> Tensor | None:
    if tensor.dim() and tensor.shape[0] == rows:
        return tensor
    if real is not None and tensor.shape[:2] == (1, real.shape[1]):  # position ids that hold for every row
        return tensor.expand(rows, *tensor.shape[1:])
    return None


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
