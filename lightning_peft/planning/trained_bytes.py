"""The bytes of what is trained, beside the weights: the optimizer's state and the checkpoint file."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.backbone.fingerprint import blank_samples
from lightning_peft.backbone.modules import state_tensors
from lightning_peft.fitting import optimizers
from lightning_peft.fitting.checkpoint_names import META
from lightning_peft.fitting.checkpoints import keep_adapters

# what the Trainer adds to a checkpoint, in bytes: loops and versions; with optimizers also
# the states of callbacks
_LOOPS, _CALLBACKS = 1_200, 600


def configured_optimizers(module: L.LightningModule, notes: list[str]) -> list[Optimizer]:
    """Return the optimizers that the module configures, holding what is trained; AdamW where it cannot say."""
    try:
        configured = module.configure_optimizers()
        instances = _optimizers_in(configured)
        optimizers.repair(module, instances)
    except Exception as error:  # whatever the user's method needs that there is not: a Trainer, values, a GPU
        notes.append(f"configure_optimizers failed ({first_line(error)}): AdamW is assumed.")
        instances = []
    if not instances:
        if not notes:
            notes.append("The module configures no optimizer: AdamW is assumed.")
        instances = [torch.optim.AdamW(p for p in module.parameters() if p.requires_grad)]
    optimizers.check(module, instances)
    return instances


def _optimizers_in(configured: Any) -> list[Optimizer]:
    """Return the optimizers in whatever form Lightning lets `configure_optimizers` return them."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, dict):
        return _optimizers_in(configured["optimizer"])
    if isinstance(configured, list | tuple):
        return [optimizer for item in configured for optimizer in _optimizers_in(item)]
    return []  # None, or a learning-rate scheduler


def optimizer_bytes(made: list[Optimizer], trainable: list[nn.Parameter], notes: list[str]) -> int:
    """Return the bytes of the optimizers' state after a step on the meta device."""
    try:
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
        for optimizer in made:
            optimizer.step()
    except Exception as error:  # an optimizer's own kernels need not know the meta device
        notes.append(
            f"A step of {type(made[0]).__name__} needs values ({first_line(error)}): AdamW's state is assumed."
        )
        return 2 * bytes_of(trainable)
    finally:
        for parameter in trainable:
            parameter.grad = None
    return sum(bytes_of(v for v in state.values() if isinstance(v, Tensor)) for o in made for state in o.state.values())


def checkpoint_bytes(module: L.LightningModule, made: list[Optimizer]) -> int:
    """Return the bytes of a checkpoint file: its tensors, and all else by writing it with tensors of one byte."""
    checkpoint: dict[str, Any] = {"state_dict": state_tensors(module)}
    keep_adapters(module, checkpoint)
    for name, described in checkpoint.get(META, {"backbones": {}})["backbones"].items():
        described["fingerprint"] = described["fingerprint"] | {"samples": blank_samples(module.get_submodule(name))}
    if module.hparams:
        checkpoint["hyper_parameters"] = dict(module.hparams)
    if made:
        checkpoint["optimizer_states"] = [optimizer.state_dict() for optimizer in made]
    size = 0

    def shrunk(value: Any) -> Any:
        nonlocal size
        if isinstance(value, Tensor):
            size += value.nbytes
            return torch.zeros(1, dtype=torch.uint8, device="cpu")
        if isinstance(value, dict):
            return {key: shrunk(item) for key, item in value.items()}
        return [shrunk(item) for item in value] if isinstance(value, list) else value

    skeleton = io.BytesIO()
    torch.save(shrunk(checkpoint), skeleton)
    return size + skeleton.tell() + _LOOPS + (_CALLBACKS if made else 0)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def first_line(error: Exception) -> str:
    """Return an error in a few words."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}".rstrip(
        ". "
    )
