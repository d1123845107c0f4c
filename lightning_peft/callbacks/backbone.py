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
    if len(candidates) != 1:
        found_text = f"{len(candidates)} candidates" if candidates else "none"
        raise ValueError(
            f"The backbone of {type(module).__name__} cannot be found unambiguously ({found_text}): "
            f"name it with backbone=...; the children are {_children(module)}."
        )
    return candidates[0]


def when_built(module: L.LightningModule, name: str | None, then: Callable[[str], None]) -> None:
    """Call `then(backbone name)` as soon as the backbone exists: now, or right after the hook that builds it.

    Called from a callback's `setup`, which runs before the module's own `setup` and `configure_model`; those are
    wrapped on the instance until the backbone has been found.
    """
    hooks = [hook for hook in ("setup", "configure_model") if is_overridden(hook, module)]
    if (found := find_backbone(module, name, final=not hooks)) is not None:
        then(found)
        return
    originals = {hook: getattr(module, hook) for hook in hooks}

    def wrap(hook: str) -> Callable[..., Any]:
        @functools.wraps(originals[hook])  # Lightning looks through __wrapped__ to see that the hook is overridden
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = originals[hook](*args, **kwargs)
            if hook in module.__dict__:
                found = find_backbone(module, name, final=hook == hooks[-1])
                if found is not None:
                    for wrapped_hook in hooks:
                        module.__dict__.pop(wrapped_hook, None)
                    then(found)
            return result

        return wrapped

    for hook in hooks:
        module.__dict__[hook] = wrap(hook)


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
