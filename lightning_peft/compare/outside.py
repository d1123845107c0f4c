"""What was trained outside of adapters, such as a head: saved beside them, and put back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.backbone.modules import state_tensors
from lightning_peft.files.atomic import new_file
from lightning_peft.stack.stack import find_stacks

OUTSIDE = "outside.safetensors"  # in a cell's folder


def trained_outside(module: nn.Module) -> int:
    """Return how many parameters require gradients outside the backbones that carry adapters."""
    inside = {id(p) for stack in find_stacks(module).values() for p in stack.backbone.parameters()}
    return sum(p.numel() for p in module.parameters() if p.requires_grad and id(p) not in inside)


def changed_outside(module: L.LightningModule, fresh: Callable[[], L.LightningModule]) -> dict[str, Tensor]:
    """Return the tensors of a module's state, outside the backbones that carry adapters, that differ from a fresh one.

    Args:
        module: the module after training.
        fresh: makes the same as it was before, without adapters; called where there is anything outside.
    """
    prefixes = tuple(f"{name}." if name else "" for name in find_stacks(module))
    outside = {name: value for name, value in state_tensors(module).items() if not name.startswith(prefixes)}
    before = state_tensors(fresh()) if outside else {}
    same = {name for name, value in outside.items() if name in before and _equal(value, before[name])}
    return {name: value.detach().cpu() for name, value in outside.items() if name not in same}


def save_outside(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write what changed outside of adapters into a cell's folder; nothing where nothing did."""
    from safetensors.torch import save_file

    if tensors:
        with new_file(folder / OUTSIDE, "tmp") as path:
            save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path)


def load_outside(module: L.LightningModule, folder: Path) -> None:
    """Put back what `save_outside` wrote, if it did."""
    from safetensors.torch import load_file

    if (folder / OUTSIDE).is_file():
        module.load_state_dict(load_file(folder / OUTSIDE), strict=False)


def _equal(value: Tensor, other: Tensor) -> bool:
    return value.shape == other.shape and torch.equal(value.cpu(), other.cpu())
