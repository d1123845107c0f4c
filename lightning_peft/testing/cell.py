"""One adaptation of one module, on which the laws are checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft.fitting.adapter_callback import AdapterCallback
from lightning_peft.replaced import replaced
from lightning_peft.stack.stack import AdapterStack, adapters

Outputs = Callable[[L.LightningModule, Any], Tensor]


def call(module: L.LightningModule, batch: object) -> Tensor:
    """Return the output of a module's `forward` on the batch: the default way to see what it computes."""
    return module(batch)


@dataclass(frozen=True)
class Cell:
    """An adaptation to examine; see `check_adaptation` for the fields."""

    make_module: Callable[[], L.LightningModule]
    callback: AdapterCallback
    batches: Sequence[Any]
    outputs: Outputs = call
    count: Callable[[L.LightningModule], int] | None = None

    def base(self) -> L.LightningModule:
        """Return the module without adapter, in evaluation mode."""
        return self.make_module().eval()

    def adapted(self, noise: float = 0.1) -> tuple[L.LightningModule, AdapterStack, AdapterCallback]:
        """Return the module with its adapters, `noise` added to whatever is trainable in them, so that they show."""
        module, callback = self.make_module(), copy.deepcopy(self.callback)
        torch.manual_seed(5)
        callback.apply(module)
        stack = adapters(module)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in trainable(stack.backbone).values():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator).to(parameter))
        return module.eval(), stack, callback

    @torch.no_grad()
    def look(self, module: L.LightningModule, batch: object, callback: AdapterCallback | None = None) -> Tensor:
        """Return what the module computes for a batch, as in validation."""
        with _answers(callback, batch):
            return self.outputs(module, batch)

    def train(self, epochs: int, ckpt_path: Path | None = None) -> L.Trainer:
        """Train on the batches, with weight decay 0.1 wherever the optimizer knows it."""
        torch.manual_seed(5)
        module = self.make_module()
        torch.manual_seed(5)
        trainer = L.Trainer(
            callbacks=[copy.deepcopy(self.callback)],
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        batches: Any = list(self.batches)
        with replaced(module, "configure_optimizers", _decayed):
            trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
        return trainer


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def adapter_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every adapter's saved tensors, under its adapter's name."""
    stack = adapters(module)
    return {f"{p.name}:{key}": value.clone() for p in stack.parts for key, value in stack.tensors(p).items()}


def rows(batch: object) -> int:
    """Return how many rows a batch has."""
    return len(first_tensor(batch))


def first_tensor(batch: object) -> Tensor:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    return next(value for value in values if isinstance(value, Tensor))


def take(batch: Any, index: Tensor) -> Any:
    """Return the batch with only these rows, in this order."""
    if isinstance(batch, Tensor):
        return batch[index]
    if isinstance(batch, Mapping):
        return {key: take(value, index) for key, value in batch.items()}
    return type(batch)(take(value, index) for value in batch)


@contextmanager
def _answers(callback: AdapterCallback | None, batch: object) -> Iterator[None]:
    if callback is None or callback.stack is None:
        yield
        return
    callback._note_answers(batch)
    try:
        yield
    finally:
        callback._note_answers(None)


def _decayed(original: Callable[[], object]) -> object:
    optimizers = original()
    for optimizer in optimizers if isinstance(optimizers, list | tuple) else [optimizers]:
        for group in getattr(optimizer, "param_groups", []):
            if "weight_decay" in group:
                group["weight_decay"] = 0.1
    return optimizers
