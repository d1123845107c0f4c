"""Adapters that peft itself put on a model, on and off for a while: peft's own switches would move gradients too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_peft.backbone.peft_private import activate, adapters_in, adapters_on, whole_wrapper
from lightning_peft.effects.text_sums import Off


def names_on(model: nn.Module) -> list[str]:
    """Return the names of the adapters that peft, or transformers by its `load_adapter`, put on a model."""
    from peft import PeftModel

    inside = {name for names in _layers(model).values() for name in names}
    return sorted(inside | (set(model.peft_config) if isinstance(model, PeftModel) else set()))


@contextmanager
def acting(model: nn.Module, name: str | None) -> Iterator[Off]:
    """Let an adapter act for a while; afterwards those act that did.

    Args:
        model: with adapters that peft put on.
        name: the adapter. If it is not among those that act, it acts alone, as `set_adapter` would have it. None: all
            that act.

    Yields:
        A function whose context has the model without it.

    Raises:
        ValueError: no adapter acts, or a prompt, of which a model has one at a time, is not the one.
    """
    layers = _layers(model)
    if not layers:
        yield _prompt_switch(model, name)
        return
    before = {layer: list(layer.active_adapters) for layer in layers}
    disabled = [layer for layer in layers if layer.disable_adapters]
    active = _unique(name for layer in layers if layer not in disabled for name in before[layer])
    with_it = active if name is None or name in active else [name]
    without = [each for each in active if each != name] if with_it is active and name is not None else []
    if not with_it:
        raise ValueError("All adapters on the model are switched off: name one, or switch one on.")

    @contextmanager
    def off() -> Iterator[None]:
        _activate(layers, without)
        try:
            yield
        finally:
            _activate(layers, with_it)

    try:
        _activate(layers, with_it)
        yield off
    finally:
        for layer in layers:
            activate(layer, before[layer])
        for layer in disabled:
            layer.enable_adapters(False)


def _layers(model: nn.Module) -> dict[Any, set[str]]:
    """Return the layers that peft put on, and the names of the adapters of each."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[Any, set[str]] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            layers[module] = adapters_on(module)
        elif isinstance(module, whole_wrapper()):
            layers[module] = adapters_in(module)
    return layers


def _activate(layers: Mapping[Any, set[str]], names: Sequence[str]) -> None:
    for layer, available in layers.items():
        activate(layer, [name for name in names if name in available])


def _prompt_switch(model: Any, name: str | None) -> Off:
    active = model.active_adapter
    if name not in (None, active):
        raise ValueError(f"Adapter {name!r} is not the one that acts: make it so by set_adapter({name!r}).")
    return model.disable_adapter


def _unique(names: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(names))
