"""Let a module's parameters read with their deltas added, for the module itself and for anyone else.

The module's class becomes a subclass, of the same name, in which those parameters are properties; its `_parameters`,
and so its names, state and identity, stay as they are. PyTorch does likewise for FSDP2. A wrapper around the module
would not be seen by whoever reads the weight directly (a tied head, `nn.MultiheadAttention` its projection), would
rename what stands inside, and could not reach parameters that belong to the model itself.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from lightning_peft.tuners.tuner import remove_child

ATTRIBUTE = "weight_deltas"  # the child that holds a module's deltas
_PLAIN = "_lightning_peft_plain_class"


def attach(owner: nn.Module, layer: nn.Module, names: set[str]) -> None:
    """Make `layer` the child that says what these parameters of `owner` read as, besides those it already had."""
    cls: Any = type(owner)
    plain = getattr(cls, _PLAIN, cls)
    owner.add_module(ATTRIBUTE, layer)
    owner.__class__ = _view(plain, tuple(sorted(names | getattr(cls, "_lightning_peft_names", set()))))


def detach(owner: nn.Module) -> None:
    """Give the module back its class and take the child out."""
    remove_child(owner, ATTRIBUTE)
    if _PLAIN in type(owner).__dict__:
        owner.__class__ = getattr(type(owner), _PLAIN)


@functools.cache
def _view(plain: Any, names: tuple[str, ...]) -> Any:
    body: dict[str, Any] = {name: property(functools.partial(_read, name=name)) for name in names}
    body |= {_PLAIN: plain, "_lightning_peft_names": set(names), "__reduce_ex__": _reduce}
    body |= {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    if issubclass(plain, nn.RNNBase):
        # recurrent layers keep a list of their parameters and read that
        body["_flat_weights"] = property(_read_all, lambda module, value: None)
    return type(plain.__name__, (plain,), body)


def _read(module: nn.Module, name: str) -> Any:
    layer: Any = module._modules.get(ATTRIBUTE)
    return module._parameters.get(name) if layer is None else layer.effective(name)


def _read_all(module: Any) -> list[Any]:
    return [getattr(module, name) for name in module._flat_weights_names]


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle and copy such a module by its plain class: its own cannot be found by name."""
    cls: Any = type(module)
    return _rebuild, (getattr(cls, _PLAIN), tuple(sorted(cls._lightning_peft_names))), module.__getstate__()


def _rebuild(plain: type, names: tuple[str, ...]) -> Any:
    cls: Any = _view(plain, names)
    return cls.__new__(cls)
