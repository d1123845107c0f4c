"""Train the task head inside a backbone with its adapter, as peft's `modules_to_save` does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_peft.backbone.modules import base_modules
from lightning_peft.backbone.nearest_names import nearest_names
from lightning_peft.backbone.targets import matching
from lightning_peft.backbone.task_heads import task_heads

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig

_PEFT_HEADS = {  # last names of the heads that peft trains for a task
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def with_heads(
    configs: Mapping[str, PeftConfig],
    backbone: nn.Module,
    train_head: bool | str | list[str],
    named: list[str] | str | None,
    saved: Collection[str] = (),
) -> dict[str, PeftConfig]:
    """Return the configurations; the first that can do so trains the backbone's heads whole.

    Args:
        configs: the adapters' configurations by name, innermost first; they are not changed.
        backbone: the model.
        train_head: see `AdapterOptions`.
        named: the modules that the user named as targets; a head among them is adapted instead.
        saved: heads that adapters on the backbone train already.

    Raises:
        ValueError: a head that was named does not exist, or has weights that cannot be trained; a module to adapt
            ends in the name of a head, by which peft would train it whole.
    """
    copies = {name: copy.copy(config) for name, config in configs.items()}
    able = [config for config in copies.values() if hasattr(config, "modules_to_save")]
    heads = [head for head in _heads(backbone, train_head, able, named) if head not in saved] if able else []
    for config in copies.values() if heads or saved else ():
        _leave_out(config, [*heads, *saved])
        _check_apart(config, heads, backbone)
    if heads:
        first: Any = able[0]
        first.modules_to_save = list(dict.fromkeys([*(first.modules_to_save or ()), *heads]))
    return copies


def saved_heads(configs: Iterable[PeftConfig]) -> set[str]:
    """Return the modules that these configurations train whole."""
    return {name for config in configs for name in getattr(config, "modules_to_save", None) or ()}


def without_heads(config: PeftConfig, heads: Collection[str]) -> PeftConfig:
    """Return a configuration as `with_heads` found it, but for targets inside the heads."""
    bare: Any = copy.copy(config)
    if hasattr(bare, "modules_to_save"):
        bare.modules_to_save = [name for name in bare.modules_to_save or () if name not in heads] or None
    _leave_out(bare, heads)
    return bare


def _heads(
    backbone: nn.Module, train_head: bool | str | list[str], configs: list[Any], named: list[str] | str | None
) -> list[str]:
    names = [name for name, _ in base_modules(backbone) if name]
    if train_head is False:
        return []
    if train_head is True:
        tasks = {str(getattr(config.task_type, "value", config.task_type)) for config in configs}
        ends = tuple(end for task in tasks for end in _PEFT_HEADS.get(task, ()))
        candidates = task_heads(backbone)
        candidates += [name for name in names if name.rpartition(".")[2] in ends and not _inside(name, candidates)]
        candidates = [head for head in candidates if not _only_target(head, named, backbone)]
        if packed := [head for head in candidates if not _trainable(backbone, head)]:
            warnings.warn(
                f"The head {packed[0]} is quantised and stays as it is: leave it out where the backbone is quantised "
                "(skip_modules, llm_int8_skip_modules) if it is to be trained.",
                stacklevel=2,
            )
        return [head for head in candidates if head not in packed]
    heads = [train_head] if isinstance(train_head, str) else list(train_head)
    for head in heads:
        if head not in names:
            near = nearest_names(head, names)
            raise ValueError(f"train_head names {head!r}, which the backbone does not have; the nearest are {near}.")
        if not _trainable(backbone, head):
            raise ValueError(f"train_head names {head!r}, which has no weights of floating point to train.")
    return heads


def _inside(name: str, heads: Collection[str]) -> bool:
    return any(name == head or name.startswith(f"{head}.") for head in heads)


def _trainable(backbone: nn.Module, head: str) -> bool:
    """Return whether all of a module's weights can be trained: quantised ones cannot."""
    parameters = list(backbone.get_submodule(head).parameters())
    return bool(parameters) and all(parameter.is_floating_point() for parameter in parameters)


def _only_target(head: str, named: list[str] | str | None, backbone: nn.Module) -> bool:
    """Return whether the user named the head, or a part of it and nothing else, as a target."""
    if named is None or (isinstance(named, str) and named.lower() == "all-linear"):
        return False
    groups = (matching(backbone, target)[1] for target in ([named] if isinstance(named, str) else [[n] for n in named]))
    return any(names and all(_inside(name, [head]) for name in names) for names in groups)


def _leave_out(config: Any, heads: Collection[str]) -> None:
    """Remove modules inside the heads from a configuration's lists of full names: heads are trained whole."""
    for field in ("target_modules", "target_parameters", "feedforward_modules", "masked"):
        value = getattr(config, field, None)
        if isinstance(value, list | set | tuple):
            remaining = [name for name in value if not _inside(name, heads)]
            setattr(config, field, set(remaining) if isinstance(value, set) else remaining)


def _check_apart(config: Any, heads: Collection[str], backbone: nn.Module) -> None:
    targets = getattr(config, "target_modules", None)
    if not targets or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return
    adapted = matching(backbone, targets if isinstance(targets, str) else sorted(targets))[1]
    for head in heads:
        if both := [name for name in adapted if name.endswith(head) and not _inside(name, heads)]:
            raise ValueError(
                f"{both[0]} is to be adapted, and peft, which finds what to train whole by the end of its name, would "
                f"take it for the head {head}: leave it out of the targets, or set train_head=False."
            )
