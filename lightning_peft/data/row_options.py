"""The arguments that the data modules over rows of a file have alike."""

from __future__ import annotations

import inspect
from typing import TypedDict

from lightning_peft.backbone.nearest_names import nearest_names


class RowOptions(TypedDict, total=False):
    """The arguments of every data module over rows of a file, besides its columns.

    Args:
        batch_size: rows of a batch; default 16.
        val_fraction: share of the groups held out for validation, from 0 to below 1; default .2.
        seed: of what is held out, of what `limit` draws, and of the order; default 0.
        limit: take only so many groups, drawn with the seed.
        max_length: the tokens that a text may have; see `cuts_long_texts`. Default: no limit but the model's.
        num_workers: of the data loaders; default 0.
        split: of a hub dataset; default `"train"`, or its only one.
    """

    batch_size: int
    val_fraction: float
    seed: int
    limit: int | None
    max_length: int | None
    num_workers: int
    split: str | None


DEFAULTS: RowOptions = {
    "batch_size": 16,
    "val_fraction": 0.2,
    "seed": 0,
    "limit": None,
    "max_length": None,
    "num_workers": 0,
    "split": None,
}


def checked_options(module: type, options: RowOptions) -> RowOptions:
    """Return the arguments that were given, and the defaults of the others.

    Args:
        module: the class of the data module, for messages.
        options: as they were given.

    Raises:
        TypeError: a name that no such class knows.
        ValueError: a value out of its range.
    """
    if unknown := sorted(options.keys() - DEFAULTS.keys()):
        near = nearest_names(unknown[0], [*inspect.signature(module).parameters, *DEFAULTS])
        raise TypeError(f"{module.__name__} has no argument {unknown[0]!r}; the nearest are {near}.")
    given: RowOptions = {**DEFAULTS, **options}
    if not 0.0 <= given["val_fraction"] < 1.0:
        raise ValueError(f"val_fraction must be at least 0 and below 1, got {given['val_fraction']}.")
    values = {"batch_size": given["batch_size"], "limit": given["limit"], "max_length": given["max_length"]}
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    return given
