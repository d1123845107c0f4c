"""A causal language model with an adapter and without it: one on the model, one in a folder, or all that are on."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import nn

from lightning_peft.effects.peft_switches import acting, names_on
from lightning_peft.effects.text_sums import Off
from lightning_peft.stack.stack import AdapterStack, adapters, find_stacks
from lightning_peft.stack.steering import steering


@contextmanager
def adapted(model: nn.Module, adapter: str | Path | None) -> Iterator[Off]:
    """Let an adapter act on a model for a while; afterwards the model is as it was, also on an exception.

    Args:
        model: a model with or without a stack of adapters, or with adapters that peft itself put on.
        adapter: the name of an adapter on the model; or a folder that `load_adapter` reads, which is put on top of what
            is there; or None for all that are on. A name goes before a folder of the same name, unless it is a `Path`.

    Yields:
        A function whose context has the model without this adapter, and with all others that are on.

    Raises:
        ValueError: no adapter is on, there is none of this name, or adapters are merged into the weights.
        AdapterError: the folder cannot be read, or is for another base model.
    """
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ValueError("The model has adapters merged into its weights: unmerge them before measuring.")
    stack = adapters(model) if find_stacks(model) else None
    names = names_on(model) if stack is None else [part.name for part in stack.parts]
    if isinstance(adapter, Path) or (adapter is not None and adapter not in names):
        _check_folder(adapter, names)
        with steering(model, adapter) as parts:
            loaded = [part.name for part in parts]
            yield lambda: _without(adapters(model), loaded)
    elif adapter is None and not names:
        raise ValueError(f"No adapter is on {type(model).__name__}, so there is nothing to compare it with: name one.")
    elif stack is None:
        with acting(model, adapter) as off:
            yield off
    else:
        with _enabled(stack, adapter) as measured:
            yield lambda: _without(stack, measured)


def _check_folder(adapter: str | Path, names: Collection[str]) -> None:
    if isinstance(adapter, str) and not Path(adapter).exists():
        on = f"which has {', '.join(map(repr, names))}" if names else "which has none"
        raise ValueError(f"{adapter!r} is neither a folder nor the name of an adapter on the model, {on}.")


@contextmanager
def _enabled(stack: AdapterStack, name: str | None) -> Iterator[list[str]]:
    """Have an adapter on for a while; yield its name, or the names of all that are on."""
    measured = [part.name for part in stack.parts if part.enabled] if name is None else [name]
    if not measured:
        raise ValueError("All adapters on the model are switched off: name one, or switch one on.")
    before = {part: part.enabled for part in stack.parts}
    try:
        for each in measured:
            if not stack[each].enabled:
                stack.enable(True, each)
        yield measured
    finally:
        for part, enabled in before.items():
            if part.enabled != enabled:
                stack.enable(enabled, part.name)


@contextmanager
def _without(stack: AdapterStack, names: Collection[str]) -> Iterator[None]:
    with ExitStack() as contexts:
        for name in names:
            contexts.enter_context(stack.disabled(name))
        yield
