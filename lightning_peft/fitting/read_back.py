"""The first checkpoint of a run is read back, so that a loss shows before hours of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_peft.fitting.checkpoint_files import check_written
from lightning_peft.fitting.checkpoint_names import trained_inside
from lightning_peft.replaced import replaced, replacements
from lightning_peft.stack.adapter_files.folder import AdapterError

_SAVE = "save_checkpoint"


def watch(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Let the Trainer's next `save_checkpoint`, and no later one, check that all trained tensors are in the file."""
    if not replacements(trainer, _SAVE, _ReadBack):
        replaced(trainer, _SAVE, _ReadBack(trainer, module).save)


def forget(trainer: L.Trainer) -> None:
    """Undo `watch`."""
    for link in replacements(trainer, _SAVE, _ReadBack):
        link.remove()


def stop(trainer: L.Trainer) -> None:
    """Undo `watch`, after reading back a file written in the background, if it exists by now."""
    for link in replacements(trainer, _SAVE, _ReadBack):
        link.by.__self__.check()  # type: ignore[attr-defined]
    forget(trainer)


class _ReadBack:
    """Wrap a Trainer's `save_checkpoint` until one has been read back."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.trainer, self.module = trainer, module
        self.written: Path | None = None

    def save(self, original: Callable[..., None], filepath: Any, *args: Any, **kwargs: Any) -> None:
        background = isinstance(self.trainer.strategy.checkpoint_io, AsyncCheckpointIO)
        if background:
            self.check()  # the file of the call before
        original(filepath, *args, **kwargs)
        self.written = Path(filepath)
        if not background:
            self.check()

    def check(self) -> None:
        """Check the file that was written last, on one process for all of them."""
        if self.written is None:
            return
        was_read, message = False, None
        names = trained_inside(self.module)  # of shards all processes must ask
        if self.trainer.is_global_zero:
            try:
                was_read = check_written(names, self.written)
            except AdapterError as error:
                message = str(error)
        was_read, message = self.trainer.strategy.broadcast((was_read, message))
        if was_read or message:
            self.written = None
            forget(self.trainer)
        if message:
            raise AdapterError(message)
