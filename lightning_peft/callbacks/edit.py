"""`fit` as one pass without gradients: capture, then compute the adapter in closed form."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_peft.callbacks.peft import PEFT
from lightning_peft.tuners.stack import AdapterStack

_TAKEN = ("training_step", "configure_optimizers")


class Edit(PEFT):
    """Base of the callbacks that compute an adapter instead of training it.

    `trainer.fit` makes one pass over the training data without gradients and without the language-model head or the
    module's own `training_step`; the edit is computed in the last `on_train_batch_end` of the epoch, before
    validation, so that logged metrics and "best" are the edited model's. It counts as one optimizer step, so that
    `ModelCheckpoint` saves; later epochs, where `min_epochs` forces them, do nothing. What was replaced on the module
    is put back at the end, and on an exception.
    """

    needs: str | None = "statements"
    computed = True

    def __init__(self, backbone: str | None = None, name: str = "edit") -> None:
        super().__init__(None, backbone, name)  # type: ignore[arg-type]
        self._taken: dict[str, Any] | None = None
        self._done = False

    # -- what a subclass says ----------------------------------------------------------------------------------------

    @abstractmethod
    def begin(self, stack: AdapterStack) -> None:
        """Prepare to capture from the backbone, this edit's own adapter being switched off."""

    @abstractmethod
    def observe(self, batch: dict[str, Tensor]) -> None:
        """Capture one batch."""

    @abstractmethod
    def compute(self, stack: AdapterStack, trainer: L.Trainer) -> None:
        """Compute the adapter from what was captured and put it in the stack."""

    @abstractmethod
    def end(self) -> None:
        """Remove hooks and forget what was captured; called however the pass ends."""

    # -- Lightning's hooks -------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._take_over(pl_module)

    def _prepare_optimizers(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass  # there is none: nothing is trained

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert self.stack is not None
        self._done = False
        self.stack.backbone.eval()
        self.stack.enable(False, self.name)
        self.begin(self.stack)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.stack is not None
        self.stack.backbone.eval()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self._done and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            assert self.stack is not None
            self.compute(self.stack, trainer)
            self.end()
            self.stack.enable(True, self.name)
            self._done = True
            steps = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
            steps.increment_ready()
            steps.increment_completed()
            trainer.should_stop = True

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._give_back(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._give_back(pl_module)

    # -- taking over the module's training ---------------------------------------------------------------------------

    def _take_over(self, module: L.LightningModule) -> None:
        """Replace the module's training on the instance, remembering what was there."""
        self._taken = {name: module.__dict__.get(name) for name in _TAKEN}
        self._taken["automatic_optimization"] = module.automatic_optimization

        def training_step(batch: Any, batch_idx: int) -> None:
            if not self._done:
                with torch.no_grad():
                    self.observe(self._labelled(batch))

        module.automatic_optimization = False
        module.__dict__["training_step"] = training_step
        module.__dict__["configure_optimizers"] = lambda: None

    def _give_back(self, module: L.LightningModule) -> None:
        if self._taken is None:
            return
        module.automatic_optimization = self._taken.pop("automatic_optimization")
        for name, original in self._taken.items():
            if original is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = original
        self._taken = None
        self.end()
        if self.stack is not None and self.name in self.stack:
            self.stack.enable(True, self.name)

    def _labelled(self, batch: Any) -> dict[str, Tensor]:
        missing = [k for k in ("input_ids", "truth", "question_id") if not isinstance(batch, dict) or k not in batch]
        if missing:
            raise ValueError(
                f"{type(self).__name__} needs labelled statements, but the training batch has no "
                f'{" and no ".join(missing)}; see `TruthfulQADataModule(train="statements")` for the batch\'s form.'
            )
        return batch


def gather(trainer: L.Trainer, *captured: Tensor) -> tuple[Tensor, ...]:
    """Every rank's captured rows, in the order of the data set, without the rows a sampler added to fill up.

    Args:
        trainer: the running Trainer.
        *captured: tensors with the same first dimension, on the CPU.
    """
    if trainer.world_size == 1:
        return captured
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, captured)
    total = sum(len(part[0]) for part in parts)
    data = getattr(trainer.train_dataloader, "dataset", None)
    size = len(data) if hasattr(data, "__len__") else total
    gathered = []
    for tensors in zip(*parts, strict=True):
        # a distributed sampler deals rows out in turn and fills up from the beginning
        dealt = torch.stack([t[: min(map(len, tensors))] for t in tensors], dim=1).flatten(0, 1)
        gathered.append(dealt[:size])
    return tuple(gathered)


def from_rank_zero(trainer: L.Trainer, make: Any) -> Any:
    """What `make()` returns on rank 0, on every rank; an error there is raised everywhere."""
    if trainer.world_size == 1:
        return make()
    result: list[Any] = [None]
    if trainer.global_rank == 0:
        try:
            result = [make()]
        except ValueError as error:
            result = [error]
    torch.distributed.broadcast_object_list(result, src=0)
    if isinstance(result[0], ValueError):
        raise result[0]
    return result[0]
