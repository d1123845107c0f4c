"""Find the backbone in a module."""

from __future__ import annotations

import sys

from torch import nn


def is_lightning_module(module: nn.Module) -> bool:
    """Return whether a module is a LightningModule. If Lightning is not loaded there can be none."""
    return isinstance(module, getattr(sys.modules.get("lightning.pytorch"), "LightningModule", ()))


def find_backbone(module: nn.Module, name: str | None, final: bool = True) -> str | None:
    """Return the name of the submodule to freeze and adapt.

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
            submodule = module.get_submodule(name)
        except AttributeError:
            submodule = None
        if isinstance(submodule, nn.Module) and any(True for _ in submodule.parameters()):
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
    metrics = getattr(sys.modules.get("torchmetrics"), "Metric", ())
    candidates = pretrained or [
        child
        for child, m in module.named_children()
        if not isinstance(m, metrics) and any(True for _ in m.parameters())
    ]
    if not candidates:
        raise ValueError(f"{type(module).__name__} has no backbone to adapt: no child of it has parameters.")
    if len(candidates) > 1:
        names = ", ".join(map(repr, candidates))
        raise ValueError(
            f"The backbone of {type(module).__name__} cannot be told among {names}: name it with the argument backbone."
        )
    return candidates[0]


def whole(module: nn.Module, name: str) -> nn.Module:
    """Return the submodule with what peft or `torch.compile` has put around it, which acts in its calls."""
    while parent := name.rpartition(".")[0]:
        outer = module.get_submodule(parent)
        if not (hasattr(outer, "peft_config") or hasattr(outer, "_orig_mod")):
            break
        name = parent
    return module.get_submodule(name)


def _pretrained(module: nn.Module) -> list[str]:
    """Return the outermost transformers models in `module`. If transformers is not loaded there can be none."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return []
    names: list[str] = []
    for name, m in module.named_modules():
        if isinstance(m, modeling.PreTrainedModel) and not any(name.startswith(f + ".") for f in names):
            names.append(name)
    return names


def _children(module: nn.Module) -> str:
    return ", ".join(repr(name) for name, _ in module.named_children()) or "none"
