"""A check that every trained tensor has a key of its own, in checkpoints and in saved folders."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_peft.fitting.checkpoint_names import checkpoint_names
from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.stack import AdapterStack


def check_complete(module: nn.Module, stacks: Mapping[str, AdapterStack]) -> None:
    """Raise `AdapterError` unless every trained tensor has a key of its own: without one it would be lost.

    Args:
        module: the LightningModule, as it is about to be trained.
        stacks: its adapters, by the names of their backbones.

    Raises:
        AdapterError: two tensors have one key, or a tensor has none; the message names them.
    """
    checkpoint_names(module, stacks)  # which has every trained tensor, and raises where two would have one name
    for stack in stacks.values():
        tensors = dict(stack.backbone.named_parameters(remove_duplicate=False))
        for part in stack.parts:
            keyed = {id(tensors[live]) for live in stack.keys(part).values() if live in tensors}
            for name, parameter in tensors.items():
                if part.name in name.split(".") and parameter.requires_grad and id(parameter) not in keyed:
                    raise AdapterError(f"{name} is trained, but adapter {part.name!r} has no key for it in a folder.")
