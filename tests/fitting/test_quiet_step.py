"""The loss of a training step can be measured in the middle of training, and training goes on as if it had not been."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torchmetrics import MeanMetric
from tuning import QUIET, Classifier, fit, one_sentence, points

from lightning_peft.callbacks import LoRA
from lightning_peft.fitting.quiet_step import check_measurable, quiet_loss

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


class Logs(Classifier):
    """Counts, logs, and returns its loss in a dictionary; takes no number of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: list[Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        loss = super().training_step(batch, 0)
        self.log_dict({"mean": self.mean(loss.detach())})
        return {"loss": loss}


class Measures(L.Callback):
    """Measure before each step, and note what the module says and holds."""

    def __init__(self, measuring: bool) -> None:
        self.measuring = measuring
        self.losses: list[float | None] = []
        self.held: list[Any] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.measuring:
            self.losses.append(quiet_loss(trainer, pl_module, batch, batch_idx))
            with torch.no_grad():
                modes = [part for part in pl_module.modules() if part.training]
                pl_module.eval()
                alone = torch.nn.functional.cross_entropy(pl_module(batch[0]), batch[1])
                for part in modes:
                    part.training = True
            assert self.losses[-1] == float(alone)
        assert isinstance(pl_module, Logs)
        mean = pl_module.mean
        self.held.append((float(mean.compute()) if mean.update_count else 0.0, mean.update_count))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.held.append((float(outputs["loss"]), float(trainer.callback_metrics["mean"])))


def test_measuring_leaves_no_trace_in_losses_metrics_and_logs() -> None:
    found = []
    for measuring in (True, False):
        measures = Measures(measuring)
        fit(Logs(), LoRA(r=2, backbone="net"), measures)
        found.append(measures.held)
        assert len(measures.losses) == 3 * measuring
    assert found[0] == found[1] and len(found[0]) == 6


def test_a_step_that_skips_a_batch_has_no_loss() -> None:
    class Skips(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            return None

    class Ask(L.Callback):
        loss: float | None = 1.0

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
            self.loss = quiet_loss(trainer, pl_module, batch, 0)

    ask = Ask()
    fit(Skips(), LoRA(r=2, backbone="net"), ask, max_steps=1)
    assert ask.loss is None


def test_a_step_that_fetches_its_own_batches_is_one_sentence() -> None:
    class Fetches(Classifier):
        def training_step(self, dataloader_iter: Any) -> None:  # type: ignore[override]
            next(dataloader_iter)

    with pytest.raises(ValueError, match="fetches its own batches") as error:
        check_measurable(Fetches(), "IST")
    assert one_sentence(str(error.value))
    assert next(iter(points()))
