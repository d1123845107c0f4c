"""Lightning checkpoints that hold only what was trained or computed: the public names of `fitting.checkpoints`."""

from __future__ import annotations

from lightning_peft.fitting.checkpoint_files import check_readable, export_checkpoint, read_checkpoint
from lightning_peft.fitting.checkpoints import AdapterCheckpointMixin, load_from_checkpoint

__all__ = ["AdapterCheckpointMixin", "check_readable", "export_checkpoint", "load_from_checkpoint", "read_checkpoint"]
