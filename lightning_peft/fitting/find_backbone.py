"""Find the backbone of a LightningModule, whenever the module builds it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torchmetrics import Metric

_WRAPPED = "_lightning_peft_wrapped"  # on a hook of ours: what was on the instance before it


def find_backbone(module: nn.Module, name: str | None, final: bool = True) -> str | None:
    """The name of the submodule to freeze and adapt.

    Without a name it is the one transformers model in the module or, once everything is built, the only child with
    parameters. Two candidates are never guessed between.

    Args:
        module: the LightningModule.
        name: the attribute path the user gave, if any.
        final: whether everything is built; if not, None is returned where the backbone may be yet to come.

    Raises:
        ValueError: the name does not exist, or there is no candidate or more than one.
    """
    if name is not None:
        try:
            found = module.get_submodule(name)
        except AttributeError:
            found = None
        if isinstance(found, nn.Module) and any(True for _ in found.parameters()):
            return name
        if final:
            raise ValueError(
                f"{type(module).__name__} has no submodule {name!r} with parameters; it has {_children(module)}."
            )
        return None
    pretrained = _pretrained(module)
    if len(pretrained) == 1:
        return pretrained[0]
    if not final:
        return None
    candidates = pretrained or [
        child for child, m in module.named_children() if not isinstance(m, Metric) and any(True for _ in m.parameters())
    ]
    if not candidates:
        raise ValueError(f"{type(module).__name__} has no backbone to adapt: no child of it has parameters.")
    if len(candidates) > 1:
        names = ", ".join(map(repr, candidates))
        raise ValueError(
            f"The backbone of {type(module).__name__} cannot be told among {names}: name it with the argument backbone."
        )
    return candidates[0]


def building_hooks(module: L.LightningModule) -> list[str]:
    """The hooks, in the order Lightning calls them, in which this module may yet build its backbone."""
    return [hook for hook in ("setup", "configure_model") if is_overridden(hook, module)]


def when_built(module: L.LightningModule, name: str | None, then: Callable[[str], object]) -> None:
    """Call `then(backbone name)` as soon as the backbone exists, and again where a hook may have built it anew.

    Called from a callback's `setup`, which runs before the module's own `setup` and `configure_model`; each of those
    is wrapped on the instance for one call.
    """

    def look(final: bool) -> None:
        if (found := find_backbone(module, name, final)) is not None:
            then(found)

    hooks = building_hooks(module)
    look(final=not hooks)
    for hook in hooks:
        _after(module, hook, functools.partial(look, hook == hooks[-1]))


def forget(module: L.LightningModule) -> None:
    """Undo `when_built` where a failed run never came to call the hooks."""
    for hook in ("setup", "configure_model"):
        while hasattr(module.__dict__.get(hook), _WRAPPED):
            _put(module, hook, getattr(module.__dict__[hook], _WRAPPED))


def _after(module: L.LightningModule, hook: str, then: Callable[[], None]) -> None:
    """Call `then` after the next call of a hook, and only that one."""
    original, before = getattr(module, hook), module.__dict__.get(hook)

    @functools.wraps(original)  # Lightning looks through __wrapped__ to see that the hook is overridden
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        _put(module, hook, before)
        result = original(*args, **kwargs)
        then()
        return result

    setattr(wrapped, _WRAPPED, before)
    module.__dict__[hook] = wrapped


def _put(module: L.LightningModule, hook: str, value: Any) -> None:
    if value is None:
        module.__dict__.pop(hook, None)
    else:
        module.__dict__[hook] = value


def _pretrained(module: nn.Module) -> list[str]:
    """Outermost transformers models in `module`. If transformers is not loaded there can be none."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return []
    found: list[str] = []
    for name, m in module.named_modules():
        if isinstance(m, modeling.PreTrainedModel) and not any(name.startswith(f + ".") for f in found):
            found.append(name)
    return found


def _children(module: nn.Module) -> str:
    return ", ".join(repr(name) for name, _ in module.named_children()) or "none"
