"""The modules that a configuration targets, in the forms that peft's own methods take."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol


class Targeting(Protocol):
    """A configuration that names modules, and perhaps the blocks in which they are meant."""

    target_modules: list[str] | str | None
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None


def order_targets(config: Targeting) -> None:
    """Put a configuration's targets in an order, so that the same ones are always saved alike.

    Raises:
        ValueError: blocks are chosen where nothing can be chosen from: the targets are a regular expression, or a
            pattern stands without numbers.
    """
    if config.target_modules is not None:
        config.target_modules = ordered(config.target_modules)
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        raise ValueError(
            f"target_modules={config.target_modules!r} is a regular expression, which can name the blocks itself: "
            "leave out layers_to_transform, or give target_modules as a list."
        )
    if config.layers_pattern is not None and config.layers_to_transform is None:
        raise ValueError(
            f"layers_pattern={config.layers_pattern!r} says where layers_to_transform are counted: give that too."
        )


def ordered(names: Collection[str] | str) -> list[str] | str:
    """Return names in the order given, those of a set in alphabetical order; a regular expression as it is."""
    if isinstance(names, str):
        return names
    return sorted(names) if isinstance(names, set | frozenset) else list(names)


def default_blocks(config: Targeting) -> list[int] | None:
    """Return the numbers of the blocks in which a configuration that names no targets adapts its own; None for all.

    peft leaves out blocks only where targets are suffixes, and own targets are full names.

    Raises:
        ValueError: blocks are to be counted in a list that is named, and own targets are found without names.
    """
    if config.layers_pattern is not None:
        raise ValueError(
            f"layers_pattern={config.layers_pattern!r} goes with target_modules: give the names that stand in those blocks."
        )
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else layers
