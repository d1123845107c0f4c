"""Tuning within a cell: each learning rate until its validation loss stops falling, and the best epoch of all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lightning_peft.compare.beginning import callback_of, module_of, trainer_of
from lightning_peft.compare.cost import PeakMemory, StepTimer
from lightning_peft.compare.outside import trained_outside
from lightning_peft.compare.plan import Plan, Row
from lightning_peft.fitting.checkpoint_names import META
from lightning_peft.fitting.checkpoints import restore_adapters
from lightning_peft.fitting.multi_phase import MultiPhase
from lightning_peft.fitting.pickles import read_file
from lightning_peft.tasks.cell import Cell


def tune(
    plan: Plan, row: Row, cell: Cell, earlier: Mapping[str, Path]
) -> tuple[L.LightningModule, dict[str, Any], int, dict[str, float]]:
    """Try every learning rate until its validation loss stops falling; return the best epoch of the best trial.

    Returns:
        The module; what was chosen; how many parameters were trained outside of adapters; what it cost, as far as it
        can be measured: `step_seconds` of the chosen trial and `peak_memory` of all.
    """
    folder, monitor = cell.folder / "trials", plan.task.monitor
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
    trials: list[dict[str, Any]] = []
    memory = PeakMemory()
    for rate in row.learning_rates:
        L.seed_everything(cell.seed, verbose=False)  # every trial starts alike
        module = module_of(plan, row, cell, earlier)
        setattr(module, "learning_rate", rate)  # noqa: B010 - which no LightningModule declares
        keep = _Keep(folder / f"lr{rate:g}", monitor=monitor, save_top_k=1)
        epochs, timer = _Epochs(monitor), StepTimer()
        stop = _Stop(monitor, patience=row.patience)
        callbacks = [callback_of(row, earlier), epochs, stop, _LastStep(), keep, timer]
        options: dict[str, Any] = {"max_epochs": row.max_epochs, "limit_train_batches": row.epoch_steps}
        if row.max_steps is not None:
            options["max_steps"] = row.max_steps
        trainer = trainer_of(plan, callbacks, enable_checkpointing=True, val_check_interval=1.0, **options)
        data = plan.task.data(cell.split, **cell.options_of(0))
        with memory:
            trainer.fit(module, datamodule=data)
        losses = epochs.losses
        if not epochs.settled:
            raise ValueError(
                f"No validation was run, but learning rates and epochs are chosen by {monitor!r}: "
                f"{type(plan.task).__name__}.data needs a validation set."
            )
        best = min(epochs.settled, key=losses.__getitem__)
        trial = {"learning_rate": rate, "epochs": best + 1, "val_losses": losses, "path": keep.best_model_path}
        trials.append(trial | {"step_seconds": timer.mean()})
        outside = trained_outside(module)
    winner = min(trials, key=lambda trial: trial["val_losses"][trial["epochs"] - 1])
    best_module = _restored(plan.task.seeded_module(cell.seed), Path(winner["path"]))
    shutil.rmtree(folder)
    measured = {"step_seconds": winner["step_seconds"], "peak_memory": memory.bytes}
    for trial in trials:
        del trial["path"], trial["step_seconds"]
    chosen = {"learning_rate": winner["learning_rate"], "epochs": winner["epochs"], "trials": trials}
    return best_module, chosen, outside, {name: value for name, value in measured.items() if value is not None}


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

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _settled(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _settled(trainer):
            super().on_validation_end(trainer, pl_module)


class _LastStep(Callback):
    """Have a validation follow the last of `max_steps`, which Lightning ends an epoch at without one."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True


class _Keep(ModelCheckpoint):
    """Keep nothing of a phase that is not the last, however low its loss: it is not the method's result."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _settled(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _settled(trainer):
            super().on_validation_end(trainer, pl_module)


def _settled(trainer: L.Trainer) -> bool:
    callbacks = getattr(trainer, "callbacks", [])
    return all(callback.settled for callback in callbacks if isinstance(callback, MultiPhase))
