"""Give one of several modules that share weights its own, while an adapter is merged into it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, eq=False)
class Own:
    """Remember what a module was given for itself, in the place of what it shared.

    Args:
        holder: the module in which it stands.
        name: under which name.
        shared: what stood there, a parameter or, where the module itself has several names, the module.
    """

    holder: nn.Module
    name: str
    shared: nn.Parameter | nn.Module

    def undo(self) -> None:
        """Put back what is shared."""
        if isinstance(self.shared, nn.Parameter):
            self.holder._parameters[self.name] = self.shared
        else:
            self.holder._modules[self.name] = self.shared


class Sharing:
    """Know where each module and each parameter of a backbone stands.

    Args:
        backbone: any module, with or without adapters.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self._places: dict[int, set[tuple[int, str]]] = {}
        for module in backbone.modules():
            for children in (module._modules, module._parameters):
                for name, child in children.items():
                    if child is not None:
                        self._places.setdefault(id(child), set()).add((id(module), name))

    def is_shared(self, child: nn.Module | nn.Parameter) -> bool:
        """Return whether a module or parameter stands in more than one place."""
        return len(self._places.get(id(child), ())) > 1

    def separate(self, wrapper: nn.Module) -> list[Own]:
        """Give the module that adapters wrap its own copy of all it shares with modules they do not wrap.

        Written into a weight in place, an adapter would act wherever else that weight is used: a tied output embedding
        under an adapter of the input's, a layer that peft's `layer_replication` repeats, a module with two names of
        which peft wraps the first.

        Args:
            wrapper: the innermost wrapper, whose `base_layer` is the module.

        Returns:
            What was given, to be undone in reverse order; nothing where nothing is shared.
        """
        owned: list[Own] = []
        base = wrapper._modules.get("base_layer")
        if base is None:
            return owned
        if self.is_shared(base):
            alone = copy.copy(base)
            for children in ("_parameters", "_buffers", "_modules"):
                alone.__dict__[children] = dict(getattr(base, children))
            owned.append(Own(wrapper, "base_layer", base))
            wrapper._modules["base_layer"] = base = alone
        for name, parameter in list(base._parameters.items()):
            if parameter is not None and (owned or self.is_shared(parameter)):
                owned.append(Own(base, name, parameter))
                clone = parameter.detach().clone()
                base._parameters[name] = nn.Parameter(clone, requires_grad=parameter.requires_grad)
        return owned


def undo(made: Iterable[Own]) -> None:
    """Put back all that modules shared."""
    for replacement in reversed(list(made)):
        replacement.undo()
