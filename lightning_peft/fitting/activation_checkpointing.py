"""Activation checkpointing from the first trained block on: backward never enters what lies below it.

transformers' own switch makes the embeddings' output require gradients, so that backward runs through every block.
Non-reentrant checkpointing does not need that.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.backbone.structure import blocks
from lightning_peft.replaced import Handle, KeptAttribute, replaced


def checkpoint_blocks(backbone: nn.Module) -> list[Handle]:
    """Turn on non-reentrant checkpointing in the blocks that backward passes, from the first trained one on.

    Blocks with checkpointing of their own (transformers') are switched; the `forward` of others is replaced.
    Where something outside the blocks is trained it may stand below them, so all are taken; those it does not stand
    below record nothing anyway.

    Args:
        backbone: with its adapters, and `requires_grad` as it will be in training.

    Returns:
        What undoes it; a block that checkpoints already is left as it is.

    Raises:
        ValueError: the backbone has no numbered list of blocks.
    """
    every = blocks(backbone)
    if not every:
        raise ValueError(
            f"{type(backbone).__name__} has no numbered list of blocks, which gradient_checkpointing needs."
        )
    inside = {id(p) for block in every for p in block.module.parameters()}
    outside = any(p.requires_grad and id(p) not in inside for p in backbone.parameters())
    trained = [any(p.requires_grad for p in block.module.parameters()) for block in every]
    first = 0 if outside else trained.index(True) if any(trained) else len(every)
    modules = [_innermost(block.module) for block in every[first:]]
    return [handle for module in modules for handle in _turn_on(module)]


def _turn_on(module: nn.Module) -> list[Handle]:
    layers = getattr(sys.modules.get("transformers.modeling_layers"), "GradientCheckpointingLayer", ())
    if isinstance(module, layers):
        if module.gradient_checkpointing:
            return []
        names = ("gradient_checkpointing", "_gradient_checkpointing_func")
        handles = [_Mode(module), *(KeptAttribute(module, name) for name in names)]
        module.gradient_checkpointing = True
        # written as a partial, since its keywords tell others how it checkpoints
        module._gradient_checkpointing_func = functools.partial(_checkpoint, use_reentrant=False)
        return handles
    return [] if "forward" in module.__dict__ else [replaced(module, "forward", _checkpointed)]


class _Mode(Handle):
    """Give a block the mode of its children: it was in training mode only to be checkpointed."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def remove(self) -> None:
        self.block.training = any(child.training for child in self.block.children())


def _innermost(module: nn.Module) -> nn.Module:
    """Return the block inside the adapters that wrap it: transformers must know what keeps a cache of keys."""
    while callable(inner := getattr(module, "get_base_layer", None)):
        module = inner()
    return module


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return _checkpoint(functools.partial(forward, **kwargs), *args, use_reentrant=False)


def _checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool) -> Any:
    # a cache of keys would be written to a second time in backward; transformers leaves it out only by name
    args = tuple(None if hasattr(value, "get_seq_length") else value for value in args)
    return checkpoint(function, *args, use_reentrant=use_reentrant)
