"""The first checkpoint of a run is read back, so that a loss shows before hours of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_peft.fitting.checkpoints import check_written, trained_inside
from lightning_peft.stack.adapter_files.folder import AdapterError

_SAVE = "save_checkpoint"


def watch(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Let the Trainer's next `save_checkpoint` see that what was trained is in the file; then no further one does."""
    if not isinstance(trainer.__dict__.get(_SAVE), _ReadBack):
        trainer.__dict__[_SAVE] = _ReadBack(trainer, module)


def forget(trainer: L.Trainer) -> None:
    """Undo `watch`."""
    if isinstance(watching := trainer.__dict__.get(_SAVE), _ReadBack):
        watching.remove()


def stop(trainer: L.Trainer) -> None:
    """Undo `watch`, after reading back what is written in the background, if it is there by now."""
    if isinstance(watching := trainer.__dict__.get(_SAVE), _ReadBack):
        watching.check()
    forget(trainer)


class _ReadBack:
    """Stands in for a Trainer's `save_checkpoint` until one has been read back."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.trainer, self.module = trainer, module
        self.original = trainer.save_checkpoint
        self.own = trainer.__dict__.get(_SAVE)
        self.written: Path | None = None

    def __call__(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        background = isinstance(self.trainer.strategy.checkpoint_io, AsyncCheckpointIO)
        if background:
            self.check()  # the file of the call before
        self.original(filepath, *args, **kwargs)
        self.written = Path(filepath)
        if not background:
            self.check()

    def check(self) -> None:
        """Check the file that was written last, on one process for all of them."""
        if self.written is None:
            return
        done, message = False, None
        names = trained_inside(self.module)  # of shards all processes must ask
        if self.trainer.is_global_zero:
            try:
                done = check_written(names, self.written)
            except AdapterError as error:
                message = str(error)
        done, message = self.trainer.strategy.broadcast((done, message))
        if done or message:
            self.remove()
        if message:
            raise AdapterError(message)

    def remove(self) -> None:
        self.written = None
        if self.trainer.__dict__.get(_SAVE) is self:
            if self.own is None:
                del self.trainer.__dict__[_SAVE]
            else:
                self.trainer.__dict__[_SAVE] = self.own
