"""A saved adapter applied while a Trainer evaluates, and at no other time."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from lightning_peft.backbone.sharded import has_shards
from lightning_peft.fitting.find_backbone import find_backbone
from lightning_peft.fitting.same_hook import same_as
from lightning_peft.positions import Positions, check_policy, note_batch
from lightning_peft.stack.checks import check_scale
from lightning_peft.stack.outer_generate import heed_outer_generate


class Steer(L.Callback):
    """Apply a saved adapter in validation (that of `fit` too), test and predict; afterwards the model is as it was.

    Nothing of it is trained or gets into a checkpoint. Edits of answer positions begin where the batch's
    `prompt_end` says, at the prompt's end in `generate`, and else where the batch's labels begin; see
    `lightning_peft.positions`. Several of these callbacks act on top of each other, the first innermost.

    Args:
        adapter: a folder that `lightning_peft.load_adapter` reads: an edit, a tuned adapter, or a stack of them.
        scale: the dial: 1 as saved, 0 equal to the model without it bit for bit, negative reversed.
        positions: which tokens an edit acts on, in place of those it was saved with; see `lightning_peft.tokens`.
        backbone: the submodule the adapter was made for; default as in `AdapterOptions`.
        strict_base: refuse an adapter made for another base model, instead of warning once.

    Raises:
        ValueError: the folder does not exist, or unknown positions; when evaluation starts, what
            `lightning_peft.steering` refuses.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import Steer
        >>> Steer("no-such-folder")
        Traceback (most recent call last):
        ValueError: no-such-folder is not a folder: name that of a saved adapter.
    """

    def __init__(
        self,
        adapter: str | Path,
        scale: float = 1.0,
        positions: str | None = None,
        backbone: str | None = None,
        strict_base: bool = True,
    ) -> None:
        if not Path(adapter).is_dir():
            raise ValueError(f"{adapter} is not a folder: name that of a saved adapter.")
        check_scale(scale)
        if positions is not None:
            check_policy(positions)
        self.adapter, self.scale, self.positions, self.backbone = adapter, scale, positions, backbone
        self.strict_base = strict_base
        self._steering: AbstractContextManager[Any] | None = None
        self._steered: nn.Module | None = None
        self._noted: list[Positions] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        from lightning_peft.stack.steering import steering

        name = find_backbone(pl_module, self.backbone)
        assert name is not None  # by now everything is built, and find_backbone raises where nothing fits
        backbone: nn.Module = pl_module.get_submodule(name)
        if has_shards(backbone):
            raise ValueError("A saved adapter cannot be put on a sharded model: evaluate with another strategy.")
        steered = steering(backbone, self.adapter, self.scale, self.positions, self.strict_base)
        steered.__enter__()
        heed_outer_generate(pl_module)
        self._steering, self._steered = steered, backbone

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note_answers(None)
        if self._steering is not None:
            steered, self._steering, self._steered = self._steering, None, None
            steered.__exit__(None, None, None)

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self._note_answers(batch)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._note_answers(None)

    on_test_start = on_predict_start = same_as("on_validation_start")
    on_test_end = on_predict_end = same_as("on_validation_end")
    on_test_batch_start = on_predict_batch_start = same_as("on_validation_batch_start")
    on_test_batch_end = on_predict_batch_end = same_as("on_validation_batch_end")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.on_validation_end(trainer, pl_module)

    def _note_answers(self, batch: Any) -> None:
        """Let edits know where the answers of this batch begin; `None` forgets it."""
        if self._steered is not None:
            self._noted = note_batch(self._noted, self._steered, batch)
