"""The tensors that belong in a checkpoint, and the name that each is saved under."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from lightning_peft.backbone.modules import eager_key, standalone_name, state_tensors
from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.stack import AdapterStack, find_stacks

META = "lightning_peft"  # under which a checkpoint describes its adapters


def checkpoint_names(
    module: nn.Module, stacks: Mapping[str, AdapterStack], state: Iterable[str] | None = None
) -> dict[str, str]:
    """Return the tensors of a checkpoint: saved name (as if adapters stood alone) -> live name.

    Args:
        module: the LightningModule.
        stacks: its adapters.
        state: the names in its state; default those of all its parameters and persistent buffers.

    Raises:
        AdapterError: two of them would be saved under one name.
    """
    live_names: dict[str, str] = {}
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    adapter = {
        join(name, live) for name, stack in stacks.items() for p in stack.parts for live in stack.keys(p).values()
    }
    for live in state_tensors(module) if state is None else state:
        if live in adapter or live in trainable or not is_inside(live, stacks):
            saved = saved_name(module, live)
            if saved in live_names:
                raise AdapterError(
                    f"{live_names[saved]} and {live} would both be saved as {saved}, and one of them lost: rename one."
                )
            live_names[saved] = live
    return live_names


def saved_name(root: nn.Module, live: str) -> str:
    """Return the name of a tensor or module, as if its adapter stood alone on a model that is not compiled."""
    return eager_key(standalone_name(root, live))


def trained_inside(module: nn.Module) -> dict[str, str]:
    """Return the trained tensors inside the backbones: saved name -> live name."""
    stacks = find_stacks(module)
    return {saved: live for saved, live in checkpoint_names(module, stacks).items() if is_inside(live, stacks)}


def is_inside(key: str, backbones: Iterable[str]) -> bool:
    return any(name == "" or key.startswith(f"{name}.") for name in backbones)


def join(backbone: str, key: str) -> str:
    return f"{backbone}.{key}" if backbone else key
