"""The order in which modules register their parameters: peft nests wrappers of several parameters in it."""

from __future__ import annotations

from torch import nn

_ORDER = "_lightning_peft_parameter_order"


def parameter_order(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's own parameters, in the order they had before any of them was wrapped."""
    return module.__dict__.get(_ORDER) or tuple(module._parameters)


def keep_parameter_order(backbone: nn.Module) -> None:
    """Put parameters back in their first order, and remember it where they are wrapped.

    While peft's wrapper of a parameter is called, it takes the parameter out of its module and registers it again, as
    the last. An adapter put on after that would be nested otherwise than on a fresh model, and its keys be others.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = list(backbone.modules())
    wrapped = {m.get_base_layer() for m in modules if isinstance(m, BaseTunerLayer) and hasattr(m, "parameter_name")}
    for module in [m for m in modules if m in wrapped or _ORDER in m.__dict__]:
        order = parameter_order(module)
        if set(order) == set(module._parameters) and order != tuple(module._parameters):
            for name in order:
                module._parameters[name] = module._parameters.pop(name)
        if module in wrapped:
            module.__dict__[_ORDER] = order
        else:
            module.__dict__.pop(_ORDER, None)
