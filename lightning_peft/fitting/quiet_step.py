"""The loss of a module's own training step, measured in the middle of training without leaving a trace."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_peft.backbone.evaluating import evaluating
from lightning_peft.replaced import replaced

# what a metric of torchmetrics keeps beside its states
_COUNTS = ("_update_count", "_computed", "_forward_cache")


def check_measurable(module: L.LightningModule, who: str) -> None:
    """Raise `ValueError` in one sentence where the loss of a training step cannot be had without training.

    Args:
        module: the LightningModule.
        who: needs the loss, as messages say it.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise ValueError(f"{who} runs the training_step to measure its loss, and that of {name} optimizes by hand.")
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(f"{who} runs the training_step on a batch again, and that of {name} fetches its own batches.")


def quiet_loss(trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> float | None:
    """Return the loss of the module's `training_step` on a batch, in evaluation mode and without gradients.

    Nothing is logged by `log` and `log_dict`; afterwards the modes, the metrics of torchmetrics and the random numbers
    are as before. A `training_step` that keeps something else on the module keeps it of this call too.

    Args:
        trainer: that trains the module.
        module: one that `check_measurable` lets pass.
        batch: on the module's device.
        batch_idx: its number.

    Returns:
        The loss; None where the step returned none, to skip the batch.
    """
    wants_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    arguments = (batch, batch_idx) if wants_index else (batch,)
    with (
        isolate_rng(include_cuda=torch.cuda.is_initialized()),
        # not inference mode: what a module keeps of the call, such as a mask, may be needed on a graph later
        torch.no_grad(),
        evaluating(module),
        _metrics_kept(module),
        replaced(module, "log", _ignore, instead=True),
        replaced(module, "log_dict", _ignore, instead=True),
        trainer.precision_plugin.train_step_context(),
    ):
        output: Any = module.training_step(*arguments)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return float(loss) if isinstance(loss, Tensor) else None


@contextmanager
def _metrics_kept(module: nn.Module) -> Iterator[None]:
    """Put the states of all metrics back afterwards."""
    kind: Any = getattr(sys.modules.get("torchmetrics"), "Metric", ())
    metrics: list[Any] = [part for part in module.modules() if isinstance(part, kind)]
    kept = [
        copy.deepcopy(metric.metric_state | {name: vars(metric)[name] for name in _COUNTS if name in vars(metric)})
        for metric in metrics
    ]
    try:
        yield
    finally:
        for metric, states in zip(metrics, kept, strict=True):
            for name, value in states.items():
                setattr(metric, name, value)


def _ignore(*_: Any, **__: Any) -> None:
    pass
