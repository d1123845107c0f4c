"""What Lightning keeps to itself and this package needs: the one file to read when Lightning changes."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy

from lightning_peft.replaced import Handle, replaced_attribute


def is_last_batch(trainer: L.Trainer) -> bool:
    """Return whether the training batch that has just run is its epoch's last."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def count_step(trainer: L.Trainer) -> None:
    """Count one optimizer step that no optimizer made, in automatic and in manual optimization."""
    loop = trainer.fit_loop.epoch_loop
    for steps in (
        loop.manual_optimization.optim_step_progress,
        loop.automatic_optimization.optim_progress.optimizer.step,
    ):
        steps.increment_ready()
        steps.increment_completed()


def load_training_data(trainer: L.Trainer) -> None:
    """Make the training data loader before the loop does."""
    trainer.fit_loop.setup_data()


def state_key(callback: Callback, name: str) -> str:
    """Return the key of a callback's state in checkpoints, which differs between adapters of different names."""
    return callback._generate_state_key(name=name)


def load_loosely(module: L.LightningModule) -> Handle:
    """Let a module load states that lack some of its tensors, whatever it says itself, until the handle is removed."""
    return replaced_attribute(module, "_strict_loading", False)


def starts_processes(launcher: object) -> bool:
    """Return whether a launcher starts processes that get a copy of the module."""
    from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

    return isinstance(launcher, _MultiProcessingLauncher)


def saves_shards(strategy: FSDPStrategy) -> bool:
    """Return whether the first FSDP writes checkpoints in shards."""
    return strategy._state_dict_type == "sharded"
