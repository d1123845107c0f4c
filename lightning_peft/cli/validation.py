"""Validation scores of saved adapters, on the module and data of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import load_file

from lightning_peft.cli.verbs import OPTIONS
from lightning_peft.fitting.adapter_callback import AdapterCallback
from lightning_peft.fitting.find_backbone import find_backbone
from lightning_peft.stack.adapter_files.compression import restore
from lightning_peft.stack.adapter_files.folder import COMPRESSED, adapter_folders
from lightning_peft.stack.adapter_files.saving import load_adapter
from lightning_peft.stack.stack import stack_of


class Scorer:
    """Build what a recipe describes, once, and validate it with one saved adapter after the other.

    Args:
        config: the YAML file that `lightning-peft fit` takes. Its adapting callbacks only say which backbone is meant.
        monitor: the logged metric that is the score.
    """

    def __init__(self, config: str, monitor: str) -> None:
        if not Path(config).is_file():
            raise ValueError(f"--config names {config}, which is not a file.")
        built = _Built(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=None,
            args=["fit", "--config", config],
            **OPTIONS,
        )
        trainer: Any = built.trainer
        self.module, self.data, self.trainer, self.monitor = built.model, built.datamodule, trainer, monitor
        if monitor == "val_loss" and getattr(self.data, "val_metrics", False) is None:
            self.data.val_metrics = False  # or choices would be scored with every adapter, for nothing
        adapting = [callback for callback in trainer.callbacks if isinstance(callback, AdapterCallback)]
        trainer.callbacks = [callback for callback in trainer.callbacks if callback not in adapting]
        name = find_backbone(self.module, adapting[0].backbone if adapting else None)
        assert name is not None  # find_backbone raises where everything is built and nothing fits
        self.backbone = self.module.get_submodule(name)

    def score(self, folder: str | Path, scale: float = 1.0) -> float:
        """Return the metric with this adapter, or stack, on the backbone.

        Args:
            folder: what `load_adapter` reads.
            scale: a factor of the magnitude of compressed adapters.

        Raises:
            ValueError: the metric is not logged in validation.
        """
        stack = stack_of(self.backbone)
        for part in reversed(list(stack.parts)):
            stack.remove(part.name)
        parts = load_adapter(self.backbone, folder)
        if scale != 1.0:
            for part, path in zip(parts, adapter_folders(Path(folder)), strict=True):
                stack.load_tensors(part, restore(load_file(path / COMPRESSED), path, scale), str(path))
        metrics: Any = self.trainer.validate(self.module, datamodule=self.data, verbose=False)[0]
        if self.monitor not in metrics:
            logged = ", ".join(metrics) or "nothing"
            raise ValueError(f"Validation logs no {self.monitor!r}, but {logged}: name one with --monitor.")
        return float(metrics[self.monitor])


class _Built(LightningCLI):
    """Build what is configured, without running it."""

    def fit(self, **_: object) -> None:
        """Do nothing, in place of the Trainer's `fit`."""
