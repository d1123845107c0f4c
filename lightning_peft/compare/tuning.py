"""Tuning within a cell: each learning rate until its validation loss stops falling, and the best epoch of all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lightning_peft.compare.beginning import callback_of, module_of, trainer_of
from lightning_peft.compare.outside import trained_outside
from lightning_peft.compare.plan import Plan, Row
from lightning_peft.fitting.checkpoint_names import META
from lightning_peft.fitting.checkpoints import restore_adapters
from lightning_peft.fitting.multi_phase import MultiPhase
from lightning_peft.fitting.pickles import read_file
from lightning_peft.tasks.cell import Cell


def tune(
    plan: Plan, row: Row, cell: Cell, earlier: Mapping[str, Path]
) -> tuple[L.LightningModule, dict[str, Any], int]:
    """Try every learning rate until its validation loss stops falling; return the best epoch of the best trial.

    Returns:
        The module; what was chosen; how many parameters were trained outside of adapters.
    """
    folder, monitor = cell.folder / "trials", plan.task.monitor
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
    trials: list[dict[str, Any]] = []
    for rate in row.learning_rates:
        L.seed_everything(plan.seed, verbose=False)  # every trial starts alike
        module = module_of(plan, row, earlier)
        setattr(module, "learning_rate", rate)  # noqa: B010 - which no LightningModule declares
        keep = _Keep(folder / f"lr{rate:g}", monitor=monitor, save_top_k=1)
        epochs = _Epochs(monitor)
        callbacks = [callback_of(row, earlier), epochs, _Stop(monitor, patience=row.patience), keep]
        trainer = trainer_of(
            plan, callbacks, max_epochs=row.max_epochs, enable_checkpointing=True, val_check_interval=1.0
        )
        trainer.fit(module, datamodule=plan.task.data(cell.split, **cell.options_of(0)))
        losses = epochs.losses
        if not epochs.settled:
            raise ValueError(
                f"No validation was run, but learning rates and epochs are chosen by {monitor!r}: "
                f"{type(plan.task).__name__}.data needs a validation set."
            )
        best = min(epochs.settled, key=losses.__getitem__)
        trials.append({"learning_rate": rate, "epochs": best + 1, "val_losses": losses, "path": keep.best_model_path})
        outside = trained_outside(module)
    winner = min(trials, key=lambda trial: trial["val_losses"][trial["epochs"] - 1])
    best_module = _restored(plan.task.module(), Path(winner["path"]))
    shutil.rmtree(folder)
    for trial in trials:
        del trial["path"]
    chosen = {"learning_rate": winner["learning_rate"], "epochs": winner["epochs"], "trials": trials}
    return best_module, chosen, outside


def _restored(module: L.LightningModule, path: Path) -> L.LightningModule:
    """Return a fresh module with the weights, and any adapters, of a checkpoint."""
    checkpoint, adapted = read_file(path), False
    if META in checkpoint:
        restore_adapters(module, checkpoint, str(path))
        adapted = True
    module.load_state_dict(checkpoint["state_dict"], strict=not adapted)
    return module


class _Epochs(Callback):
    """Keep every epoch's validation loss, and which epochs, counted from 0, are of the last phase."""

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self.losses: list[float] = []
        self.settled: list[int] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"{type(pl_module).__name__} logs no {self.monitor!r} in validation, which learning rates and epochs "
                f"are chosen by; it logs {', '.join(trainer.callback_metrics) or 'nothing'}."
            )
        if _settled(trainer):
            self.settled.append(len(self.losses))
        self.losses.append(float(trainer.callback_metrics[self.monitor]))


class _Stop(EarlyStopping):
    """Stop training in its last phase only, not in LoFiT's scales or LT-SFT's full fine-tuning."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _settled(trainer):
            super().on_validation_end(trainer, pl_module)


class _Keep(ModelCheckpoint):
    """Keep nothing of a phase that is not the last, however low its loss: it is not the method's result."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _settled(trainer):
            super().on_validation_end(trainer, pl_module)


def _settled(trainer: L.Trainer) -> bool:
    callbacks = getattr(trainer, "callbacks", [])
    return all(callback.settled for callback in callbacks if isinstance(callback, MultiPhase))
