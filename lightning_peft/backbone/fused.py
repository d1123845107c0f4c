"""Layers whose weights PyTorch reads without calling them: an adapter on such a layer would do nothing."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_peft.backbone.modules import base_modules, is_linear, is_matrix
from lightning_peft.replaced import replaced_attribute

_UNFUSED = "_lightning_peft_unfused"


def unfuse(backbone: nn.Module, acting: bool) -> None:
    """Keep `nn.TransformerEncoderLayer` off its fused path while adapters act, and let it back when none does.

    In evaluation mode, in which a frozen backbone always runs, that path computes the whole layer from its weights.
    """
    for module in backbone.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            if not acting and _UNFUSED in module.__dict__:
                module.__dict__.pop(_UNFUSED).remove()
            elif acting and _UNFUSED not in module.__dict__:
                # what the layer itself asks before it takes the path
                module.__dict__[_UNFUSED] = replaced_attribute(module, "activation_relu_or_gelu", 0)


def never_called(backbone: nn.Module) -> set[str]:
    """Return the names of linear layers that are read, not called: `nn.MultiheadAttention`'s output projections."""
    return {f"{n}.out_proj" for n, m in base_modules(backbone) if isinstance(m, nn.MultiheadAttention)}


def read_by_kernels(backbone: nn.Module) -> set[str]:
    """Return the names of matrices in state-space mixers, such as Mamba's, that are read without being called.

    Which they are depends on the model and on whether its kernels are installed: the time step's almost everywhere,
    the output's and others in a fused kernel. The first linear layer, which takes the mixer's input, is none of them.
    """
    unreached = set()
    for name, module in base_modules(backbone):
        if {"A_log", "D"} <= module._parameters.keys():
            children = {n: child for n, child in module.named_children() if is_matrix(child)}
            first = next((n for n, child in children.items() if is_linear(child)), None)
            unreached |= {f"{name}.{n}" for n in children if n != first}
    return unreached


def check_called(targets: Iterable[str], backbone: nn.Module) -> None:
    """Raise `ValueError` in one sentence where one of the modules to adapt is never called."""
    if unreached := sorted(never_called(backbone) & set(targets)):
        raise ValueError(
            f"{unreached[0]} is never called, since nn.MultiheadAttention reads its weight: adapt the attention "
            f"itself, {unreached[0].removesuffix('.out_proj')}, with a method that can, such as LoRA."
        )
