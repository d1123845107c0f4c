"""Wait for the backbone of a LightningModule, whenever the module builds it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_peft.backbone.find_backbone import find_backbone
from lightning_peft.replaced import replaced, replacements

_BUILDING = ("setup", "configure_model")


def building_hooks(module: L.LightningModule) -> list[str]:
    """Return the hooks, in Lightning's order, in which this module may yet build its backbone."""
    return [hook for hook in _BUILDING if is_overridden(hook, module)]


def when_built(module: L.LightningModule, name: str | None, then: Callable[[str], object]) -> None:
    """Call `then(backbone name)` as soon as the backbone exists, and again where a hook may have built it anew.

    Called from a callback's `setup`, which runs before the module's own `setup` and `configure_model`; each of those
    is replaced on the instance for one call.
    """

    def look(final: bool) -> None:
        if (backbone_name := find_backbone(module, name, final)) is not None:
            then(backbone_name)

    hooks = building_hooks(module)
    look(final=not hooks)
    for hook in hooks:
        replaced(module, hook, _CallAfter(functools.partial(look, hook == hooks[-1])).after, once=True)


def forget(module: L.LightningModule) -> None:
    """Undo `when_built` where a failed run never came to call the hooks."""
    for hook in _BUILDING:
        for waiting in replacements(module, hook, _CallAfter):
            waiting.remove()


class _CallAfter:
    """A method that calls a function after the original."""

    def __init__(self, then: Callable[[], object]) -> None:
        self.then = then

    def after(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self.then()
        return result
