"""The modes of a frozen backbone while its adapters are trained: evaluation, and no needless gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from lightning_peft.backbone.modules import AdapterState
from lightning_peft.backbone.peft_private import whole_wrapper
from lightning_peft.replaced import Handle, replaced_attribute
from lightning_peft.stack.stack import stack_of


def set_modes(backbone: nn.Module, dropout: bool, frozen: Collection[str] = ()) -> None:
    """Put frozen parts in evaluation mode (with `dropout`, normalisation only), adapters not `frozen` in training."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    whole = whole_wrapper()

    backbone.train(dropout)
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    for module in backbone.modules():
        if isinstance(module, BaseTunerLayer | whole):
            module.training = True  # some tuners ask the layer itself whether their dropout is on
            base = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
            for child in module.children():
                if child is not base:
                    child.train()
                    for name, part in child.named_children():  # what was added stands under its adapter's name
                        part.train(name not in frozen)
        elif isinstance(module, AdapterState):
            for name, part in module.named_children():
                part.train(name not in frozen)
    _checkpoint_in_evaluation(backbone, dropout)


def stop_input_gradients(backbone: nn.Module) -> None:
    """Undo `enable_input_require_grads` where checkpointing does not need it.

    transformers turns it on with activation checkpointing for every text model, and backward then runs through all
    frozen blocks below the first adapter. Only reentrant checkpointing needs it; the adapter's gradient is the same.
    """
    functions = (getattr(m, "_gradient_checkpointing_func", None) for m in backbone.modules())
    reentrant = any(f is not None and getattr(f, "keywords", {}).get("use_reentrant", True) for f in functions)
    if not reentrant:
        for module in backbone.modules():
            if hasattr(module, "disable_input_require_grads"):
                module.disable_input_require_grads()  # type: ignore[operator]


def _checkpoint_in_evaluation(backbone: nn.Module, dropout: bool) -> None:
    """Keep activation checkpointing on in a frozen backbone: transformers leaves it out in evaluation mode."""
    layers = getattr(sys.modules.get("transformers.modeling_layers"), "GradientCheckpointingLayer", ())
    for module in backbone.modules():
        if isinstance(module, layers) and module.gradient_checkpointing:
            function = module._gradient_checkpointing_func
            if isinstance(function, _Checkpoint):
                if dropout:
                    function.remove()
            elif not dropout:
                stack_of(backbone).while_adapted(_Checkpoint(module, function))
            module.training = True


class _Checkpoint(Handle):
    """A block's checkpointing function that runs the block in evaluation mode, now and when it is recomputed."""

    def __init__(self, block: nn.Module, checkpoint: Callable[..., Any]) -> None:
        self.block, self.checkpoint = block, checkpoint
        self.keywords = getattr(checkpoint, "keywords", {})
        self._handle = replaced_attribute(block, "_gradient_checkpointing_func", self)

    def remove(self) -> None:
        self._handle.remove()
        self.block.training = any(child.training for child in self.block.children())

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.checkpoint(self._run, function, *args)

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        self.block.training = False
        try:
            return function(*args)
        finally:
            self.block.training = True
