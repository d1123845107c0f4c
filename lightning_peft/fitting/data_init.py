"""A look at training data before training, for initialisations that depend on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_peft.fitting.lightning_private import load_training_data
from lightning_peft.replaced import replaced
from lightning_peft.stack.injection.eva import Inputs


def look(trainer: L.Trainer, module: L.LightningModule, inputs: Inputs, batches: int) -> int:
    """Run the module's `training_step` on its first batches, without gradients, while its layers are watched.

    Nothing is logged, the random state is restored, and processes add up their observations.

    Args:
        trainer: in fit, its strategy set up.
        module: the LightningModule.
        inputs: the moments to collect.
        batches: how many batches to look at, at most.

    Returns:
        How many there were.

    Raises:
        ValueError: the module optimizes by hand, so that its `training_step` would train, or there is no batch.
    """
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} optimizes by hand in its training_step, which cannot be run to look at data: use "
            "another init."
        )
    load_training_data(trainer)
    count = 0
    with torch.random.fork_rng(), torch.no_grad(), _evaluating(module), trainer.precision_plugin.train_step_context():
        for count, batch in enumerate(trainer.train_dataloader or (), start=1):
            batch = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch))
            with inputs.observed(_token_mask(batch)):
                module.training_step(batch, count - 1)
            if count == batches:
                break
    if count == 0:
        raise ValueError("There is no training batch to look at: use another init.")
    inputs.sum_over(lambda moment: trainer.strategy.reduce(moment, reduce_op="sum"))  # type: ignore[arg-type, return-value]
    return count


def _token_mask(batch: Any) -> Tensor | None:
    """Return the mask `[B, T]` of tokens that count: those with a label, else those that are no padding."""
    if not isinstance(batch, Mapping):
        return None
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and labels.dim() == 2:
        return labels != -100
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


@contextmanager
def _evaluating(module: L.LightningModule) -> Iterator[None]:
    """Put the module in evaluation mode and log nothing: before the loop runs there is nowhere to log to."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with replaced(module, "log", _ignore, instead=True), replaced(module, "log_dict", _ignore, instead=True):
            yield
    finally:
        for part in training:
            part.training = True


def _ignore(*_: Any, **__: Any) -> None:
    pass
