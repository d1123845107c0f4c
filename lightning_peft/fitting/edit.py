"""`fit` as one pass without gradients: capture, then compute the adapter in closed form."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, Unpack

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_peft.fitting.adapter_callback import AdapterCallback, EditOptions, by_name
from lightning_peft.fitting.lightning_private import count_step, is_last_batch
from lightning_peft.replaced import Handle, replaced
from lightning_peft.stack.outer_generate import heed_outer_generate
from lightning_peft.stack.stack import AdapterStack

T = TypeVar("T")


class Edit(AdapterCallback):
    """Base of the callbacks that compute an adapter instead of training it.

    `trainer.fit` makes one pass over the training data without gradients and without the language-model head or the
    module's own `training_step`; the edit is computed in the last `on_train_batch_end` of the epoch, before
    validation, so that logged metrics and "best" are the edited model's. It counts as one optimizer step, so that
    `ModelCheckpoint` saves; later epochs, where `min_epochs` forces them, do nothing. What was replaced on the module
    is put back at the end, and on an exception.
    """

    default_name = "edit"

    computed = True

    def __init__(self, *positional: str | None, **options: Unpack[EditOptions]) -> None:
        super().__init__(**by_name(positional, options))
        self._taken: list[Handle] = []
        self._automatic = True  # the module's `automatic_optimization`
        self._done = False

    # -- what a subclass says ----------------------------------------------------------------------------------------

    @abstractmethod
    def begin(self, stack: AdapterStack) -> None:
        """Prepare to capture from the backbone, this edit's own adapter being switched off."""

    @abstractmethod
    def observe(self, batch: Mapping[str, Tensor]) -> None:
        """Capture one batch."""

    @abstractmethod
    def compute(self, stack: AdapterStack, trainer: L.Trainer) -> None:
        """Compute the adapter from the captured rows and put it in the stack."""

    @abstractmethod
    def end(self) -> None:
        """Remove hooks and forget captured rows; called however the pass ends."""

    # -- Lightning's hooks -------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._check_alone(trainer)
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._take_over(pl_module)

    def _prepare_optimizers(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass  # there is none: nothing is trained

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert self.stack is not None
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
        if not self._done and is_last_batch(trainer):
            assert self.stack is not None
            self.compute(self.stack, trainer)
            heed_outer_generate(pl_module)
            self.end()
            self.stack.enable(True, self.name)
            self._done = True
            count_step(trainer)  # whether the module is asked while taken over (manual optimization) or afterwards
            trainer.should_stop = True

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._give_back(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if stage == "fit" and self._taken:
            self._give_back(pl_module)
            if not self._done and trainer.global_step == 0:  # else the edit came with a checkpoint
                raise RuntimeError(
                    f"{type(self).__name__} computed nothing, because fit ended before the first epoch did: it needs "
                    "one whole pass over the training data."
                )

    # -- what is reported --------------------------------------------------------------------------------------------

    def planned_numbers(self, stack: AdapterStack) -> int:
        """Return how many numbers will be computed."""
        return sum(tensor.numel() for tensor in stack.tensors(stack[self.name]).values())

    def computed_numbers(self, stack: AdapterStack) -> str:
        """Say how many numbers were computed, and of what."""
        places = len(stack[self.name].injection.places())
        return f"{self.planned_numbers(stack):,} numbers in {places} module{'s' * (places != 1)}"

    def report_lines(
        self, module: L.LightningModule, stack: AdapterStack, names: Sequence[str]
    ) -> tuple[list[tuple[str, str]], str]:
        numbers = f"{self.name}: {self.computed_numbers(stack)}; nothing was trained"
        if not self._done:
            numbers = f"{self.name}: nothing was computed, since the edit came with a checkpoint"
        return [("edited", numbers)], f"adapters(module).scale(0.5, {self.name!r}) turns it down."

    def _numbers_to_edit(self, stack: AdapterStack) -> dict[str, int]:
        return {self.name: self.planned_numbers(stack)}

    # -- taking over the module's training ---------------------------------------------------------------------------

    def _take_over(self, module: L.LightningModule) -> None:
        """Replace the module's training on the instance."""

        def training_step(batch: Any, *_: Any) -> None:
            if not self._done:
                with torch.no_grad():
                    self.observe(batch)

        self._done = False
        self._automatic, module.automatic_optimization = module.automatic_optimization, False
        self._taken = [
            replaced(module, "training_step", training_step, instead=True),
            replaced(module, "configure_optimizers", lambda: None, instead=True),
        ]

    def _give_back(self, module: L.LightningModule) -> None:
        if not self._taken:
            return
        module.automatic_optimization = self._automatic
        while self._taken:
            self._taken.pop().remove()
        self.end()
        if self.stack is not None and self.name in self.stack:
            self._note_answers(None)
            self.stack.enable(True, self.name)
            self.stack[self.name].tuner.set_requires_grad(self.name, False)

    def _check_alone(self, trainer: L.Trainer) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        others = [type(c).__name__ for c in callbacks if isinstance(c, AdapterCallback) and c is not self]
        if others:
            raise ValueError(
                f"{type(self).__name__} takes the whole of fit, so {others[0]} cannot share it: fit one after the "
                "other, each in a Trainer of its own; the adapters stack."
            )


def gather(trainer: L.Trainer, *captured: Tensor) -> tuple[Tensor, ...]:
    """Return the captured rows of all ranks on each, without those a distributed sampler added to fill up.

    Args:
        trainer: the running Trainer.
        *captured: tensors with the same first dimension, on the CPU.
    """
    if trainer.world_size == 1:
        return captured
    ranks: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(ranks, captured)
    sampler = getattr(trainer.train_dataloader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return tuple(torch.cat(tensors) for tensors in zip(*ranks, strict=True))
    # such a sampler deals rows out in turn, as many to each rank, and fills up at the end
    size = len(sampler.dataset)  # type: ignore[arg-type]
    return tuple(torch.stack(tensors, dim=1).flatten(0, 1)[:size] for tensors in zip(*ranks, strict=True))


def from_rank_zero(trainer: L.Trainer, make: Callable[[], T]) -> T:
    """Return on every rank the result of `make()` on rank 0; an error there is raised everywhere."""
    if trainer.world_size == 1:
        return make()
    result: list[Any] = [None]
    if trainer.global_rank == 0:
        try:
            result = [make()]
        except Exception as error:  # whatever it is: the other ranks are waiting
            result = [error]
    torch.distributed.broadcast_object_list(result, src=0)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]
