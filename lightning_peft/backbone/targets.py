"""Choose the modules to adapt: by name, by block, within attention or feed-forward parts, or by default."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.backbone.block_parts import is_inside
from lightning_peft.backbone.defaults import (
    all_linear,
    default_targets,
    is_every_linear,
    taken_for_experts,
    takes_adapters,
)
from lightning_peft.backbone.fused import read_by_kernels
from lightning_peft.backbone.language_model import part_blocks, part_names
from lightning_peft.backbone.modules import base_modules, standalone_name
from lightning_peft.backbone.nearest_names import nearest_clause
from lightning_peft.backbone.structure import blocks

# a kind of part of each block, a part of the model, or both
Within = str | list[str]
KINDS = ("attention", "mlp")
ALL_LINEAR = "all-linear"  # peft's word


@dataclass(frozen=True)
class Layers:
    """Some of a backbone's blocks, chosen by one rule. An encoder's and a decoder's blocks are counted apart.

    Args:
        first: this many, from the first block on.
        last: this many, up to the last block.
        every: each n-th block, beginning with block n - 1, so that the last of n is taken.
        random: this many, drawn with `seed`.
        seed: of the draw.

    Raises:
        ValueError: not exactly one rule is given, or its number is not positive.

    Example:
        >>> Layers(last=2).choose([0, 1, 2, 3])
        [2, 3]
    """

    first: int | None = None
    last: int | None = None
    every: int | None = None
    random: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {n: v for n in ("first", "last", "every", "random") if (v := getattr(self, n)) is not None}
        if len(rules) != 1:
            raise ValueError(f"Layers takes exactly one of first, last, every and random, got {rules or 'none'}.")
        if min(rules.values()) < 1:
            raise ValueError(f"The number of layers must be at least 1, got {rules}.")

    def choose(self, numbers: Iterable[int]) -> list[int]:
        """Return the block numbers that the rule takes, in order.

        Raises:
            ValueError: there are fewer blocks than asked for.
        """
        known = sorted(numbers)
        count = self.first or self.last or self.every or self.random or 0
        if count > len(known):
            raise ValueError(f"{self} asks for {count} blocks, but there are {len(known)}.")
        if self.every:
            return known[self.every - 1 :: self.every]
        if self.random:
            return sorted(random.Random(self.seed).sample(known, self.random))
        return known[:count] if self.first else known[-count:]


def choose_targets(
    backbone: nn.Module,
    target_modules: list[str] | str | None = None,
    layers: Layers | list[int] | None = None,
    within: Within | None = None,
) -> list[str] | str:
    """Return the modules to adapt, for a peft configuration's `target_modules`.

    Args:
        backbone: the model to adapt.
        target_modules: names or ends of names, a regular expression for whole names, or `"all-linear"`; default: see
            `default_targets`, or with `within` every matrix of that part.
        layers: which blocks; default all.
        within: `"attention"` or `"mlp"`: only modules in these parts of blocks. `"vision"`, `"all"` or a submodule's
            name: those of another part of the model, where `layers` and `within` mean by default its language model,
            see `backbone.language_model`. A list of one of each: both.

    Returns:
        What was given where nothing restricts it, else full names.

    Raises:
        ValueError: nothing is left, a block that was asked for does not exist, or the feed-forward parts are mixtures
            of experts that are fused into parameters.
    """
    modules, parameters = choose_with_experts(backbone, target_modules, None, layers, within)
    if parameters and target_modules is None:
        raise ValueError(
            f"The feed-forward parts of {type(backbone).__name__} hold experts fused into parameters, such as "
            f"{parameters[0]}, which this method cannot adapt: name the target_modules, or use LoRA or FullFineTuning."
        )
    return modules


def choose_with_experts(
    backbone: nn.Module,
    target_modules: list[str] | str | None = None,
    target_parameters: list[str] | None = None,
    layers: Layers | list[int] | None = None,
    within: Within | None = None,
) -> tuple[list[str] | str, list[str]]:
    """Return the modules and parameters to adapt, for peft's `target_modules` and `target_parameters`.

    Args:
        backbone: the model to adapt.
        target_modules: as in `choose_targets`.
        target_parameters: names or ends of names of parameters. By default those that hold a mixture's experts, where
            the feed-forward parts are asked for as a whole, by `within="mlp"` or by `"all-linear"` in some layers.
        layers: as in `choose_targets`.
        within: as in `choose_targets`.

    Returns:
        Modules, as `choose_targets` gives them, and the full names of parameters.

    Raises:
        ValueError: as `choose_targets`.
    """
    kind, part = split_within(within, backbone)
    prefixes = None if layers is None and within is None else part_names(backbone, part)
    inside = None if kind is None else _parts(backbone, kind, part)
    modules, parameters = target_modules, target_parameters
    shorthand = isinstance(modules, str) and modules.lower() == ALL_LINEAR
    if shorthand and layers is None and inside is None and is_every_linear(backbone):
        return ALL_LINEAR, _full_names(backbone, parameters or [])  # peft knows more of it than names
    if shorthand:
        modules = all_linear(backbone)
    elif modules is None:
        modules = default_targets(backbone) if inside is None else [name for name in inside if inside[name]]
    if parameters is None:
        whole = shorthand or (target_modules is None and kind == "mlp")
        parameters = [name for block in blocks(backbone) for name in block.experts] if whole else []
    parameters = _full_names(backbone, parameters)
    if layers is None and inside is None and prefixes is None and not shorthand:
        return modules, parameters
    unknown, names = matching(backbone, modules)
    if prefixes is not None:
        names = [name for name in names if is_inside(name, prefixes)]
        parameters = [name for name in parameters if is_inside(name, prefixes)]
        if not names and not unknown and not parameters:
            raise ValueError(
                f"None of the target modules is in {part or 'the language model'}, of which are "
                f'{", ".join(prefixes)}: name the part of the model that holds them, e.g. within="vision".'
            )
    if inside is not None:
        names = [name for name in names if name in inside]
        parameters = [name for name in parameters if name in inside]
        if not names and not unknown and not parameters:
            raise ValueError(f"None of the target modules is in the {kind} of a block.")
    if layers is not None:
        in_layers = _in_layers(names + parameters, layers, checked=not unknown)
        names, parameters = [n for n in names if n in in_layers], [n for n in parameters if n in in_layers]
    return names + unknown, parameters  # what matches nothing is kept, to be refused with the nearest names


def beside_experts(backbone: nn.Module, modules: list[str] | str, parameters: list[str]) -> tuple[Any, list[str]]:
    """Return the modules and parameters as peft's LoRA must be told them, to adapt these and no others.

    Of a mixture peft takes some names of modules for its experts, see `taken_for_experts`. A module that is given by
    such a full name is given by its weight, which comes to the same.
    """
    if isinstance(modules, str) or not (last := taken_for_experts(backbone)):
        return modules, parameters
    named = {name for name, _ in base_modules(backbone)}
    taken = [name for name in modules if name in named and name.rpartition(".")[2] in last]
    return [n for n in modules if n not in set(taken)], [*parameters, *(f"{name}.weight" for name in taken)]


def _full_names(backbone: nn.Module, parameters: list[str]) -> list[str]:
    """Return the full names of the parameters given by their ends, in the model's order."""
    names = [standalone_name(backbone, name) for name, _ in backbone.named_parameters()] if parameters else []
    full_names = [name for name in names if any(name == p or name.endswith(f".{p}") for p in parameters)]
    for parameter in parameters:
        if not any(name == parameter or name.endswith(f".{parameter}") for name in full_names):
            near = nearest_clause(parameter, names)
            raise ValueError(f"No parameter of the backbone is called {parameter!r}{near}.")
    return full_names


def split_within(within: Within | None, backbone: nn.Module) -> tuple[str | None, str | None]:
    """Return the kind of part of a block, `"attention"` or `"mlp"`, and the part of the model that `within` names.

    Raises:
        ValueError: it names two of one sort, or no part of the model.
    """
    names = [] if within is None else [within] if isinstance(within, str) else list(within)
    kinds = [name for name in names if name in KINDS]
    parts = [name for name in names if name not in KINDS]
    if len(kinds) > 1 or len(parts) > 1:
        raise ValueError(f'within takes "attention" or "mlp", and the name of one part of the model, got {within!r}.')
    kind, part = next(iter(kinds), None), next(iter(parts), None)
    if part is not None:
        try:
            part_names(backbone, part)
        except ValueError as error:
            raise ValueError(f'within must be "attention" or "mlp", or name a part of the model: {error}') from None
    return kind, part


def _parts(backbone: nn.Module, within: str, part: str | None) -> dict[str, bool]:
    """Return the names of the matrices in all blocks' parts of this kind, in order; True where one is a module."""
    is_module: dict[str, bool] = {}
    named, unreached = dict(base_modules(backbone)), read_by_kernels(backbone)
    for block in part_blocks(backbone, part):
        spans = block.attention if within == "attention" else (block.mlp,) if block.mlp else ()
        names = [name for span in spans for name in span.matrices if name not in unreached]
        is_module |= dict.fromkeys((name for name in names if takes_adapters(named[name])), True)
        is_module |= dict.fromkeys(block.experts if within == "mlp" else (), False)
    if not is_module:
        raise ValueError(f"{type(backbone).__name__} has no block with {within} in it: name the target_modules.")
    return is_module


def matching(backbone: nn.Module, targets: list[str] | str) -> tuple[list[str], list[str]]:
    """Return the targets that match nothing, and the full names that match."""
    names = list(dict.fromkeys(name for name, _ in base_modules(backbone) if name))
    if isinstance(targets, str):
        return ([], full_names) if (full_names := [n for n in names if re.fullmatch(targets, n)]) else ([targets], [])
    unknown = {t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)}
    ends = tuple(f".{t}" for t in targets)
    exact = set(targets)
    return sorted(unknown), [n for n in names if n in exact or n.endswith(ends)]


def _in_layers(names: list[str], layers: Layers | list[int], checked: bool) -> list[str]:
    """Return the names in blocks of these numbers, counted in the outermost numbered list of each."""
    numbered = {name: (m[1], int(m[2])) for name in names if (m := re.match(r"(?:(.*?)\.)??(\d+)(?:\.|$)", name))}
    stacks: dict[str, set[int]] = {}
    for stack, number in numbered.values():
        stacks.setdefault(stack or "", set()).add(number)
    if isinstance(layers, Layers):
        chosen = {stack: set(layers.choose(numbers)) for stack, numbers in stacks.items()}
        return [name for name, (stack, number) in numbered.items() if number in chosen[stack or ""]]
    every = {number for numbers in stacks.values() for number in numbers}
    if checked and (absent := sorted(set(layers) - every)):
        known = ", ".join(map(str, sorted(every))) or "in no numbered list"
        raise ValueError(f"There is no block {absent[0]} to adapt: the blocks with target modules are {known}.")
    return [name for name, (_, number) in numbered.items() if number in layers]
