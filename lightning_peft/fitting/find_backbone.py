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

from lightning_peft.replaced import replaced, replacements

_BUILDING = ("setup", "configure_model")


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
    return [hook for hook in _BUILDING if is_overridden(hook, module)]


def when_built(module: L.LightningModule, name: str | None, then: Callable[[str], object]) -> None:
    """Call `then(backbone name)` as soon as the backbone exists, and again where a hook may have built it anew.

    Called from a callback's `setup`, which runs before the module's own `setup` and `configure_model`; each of those
    is replaced on the instance for one call.
    """

    def look(final: bool) -> None:
        if (found := find_backbone(module, name, final)) is not None:
            then(found)

    hooks = building_hooks(module)
    look(final=not hooks)
    for hook in hooks:
        replaced(module, hook, _Then(functools.partial(look, hook == hooks[-1])).after, once=True)


def forget(module: L.LightningModule) -> None:
    """Undo `when_built` where a failed run never came to call the hooks."""
    for hook in _BUILDING:
        for waiting in replacements(module, hook, _Then):
            waiting.remove()


class _Then:
    """Does something after a call."""

    def __init__(self, then: Callable[[], object]) -> None:
        self.then = then

    def after(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self.then()
        return result


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
