"""Training in phases: at given optimizer steps the adapter is changed, and then training goes on."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from lightning_peft.backbone.sharded import whole, write
from lightning_peft.fitting.adapter_callback import AdapterCallback
from lightning_peft.moved.names import keep_old_names

if TYPE_CHECKING:
    from lightning_peft.stack.adapter import Adapter
    from lightning_peft.stack.configs import PeftConfig
    from lightning_peft.stack.stack import AdapterStack
    from lightning_peft.tuners.weight_deltas.masks import Delta


class MultiPhase(AdapterCallback):
    """A callback whose adapter gets other masks and values at certain steps; its parameters stay the same ones.

    A change happens before the first batch of its phase, so that validation and checkpoints at the end of a phase see
    the result of the phase. The optimizers then forget their state; learning-rate schedules run on. Which parameters
    require gradients never changes, so DDP need not know; every process makes the same change from the same weights.
    A checkpoint holds the masks and the phase, and a resumed run keeps the phases of the run it continues.
    """

    steps: list[int]  # before which optimizer steps there is a change; found when training starts
    turn: int  # the next change

    @abstractmethod
    def plan(self, total: float, epoch: float) -> list[int]:
        """Return the optimizer steps before which there is a change.

        Args:
            total: optimizer steps of the whole training; infinite where it has no end.
            epoch: optimizer steps of one epoch.
        """

    @abstractmethod
    def change(self, turn: int) -> bool:
        """Make change number `turn`, without gradients, and say whether the optimizers should begin anew."""

    @abstractmethod
    def flattened(self) -> bool:
        """Return whether the strategy has flattened the parameters that changes are made in."""

    @abstractmethod
    def has_chosen(self) -> bool:
        """Return whether an earlier training has made the changes already."""

    @property
    def settled(self) -> bool:
        """True once training is in its last phase: a result from before is not the method's."""
        return bool(self.steps) and self.turn >= len(self.steps)

    def _place(self, stack: AdapterStack, name: str, config: PeftConfig) -> Adapter:
        if name not in stack:
            self.steps, self.turn = [], 0  # the callback may have trained another module before
        return super()._place(stack, name, config)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "turn": self.turn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.turn = list(state_dict["steps"]), int(state_dict["turn"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.flattened():
            raise ValueError(f"{type(self).__name__} needs whole parameters, which this strategy flattens: use DDP.")
        total = trainer.estimated_stepping_batches
        if not self.steps:
            self.steps = self.plan(total, trainer.num_training_batches / trainer.accumulate_grad_batches)
            if self.has_chosen():
                self.turn = len(self.steps)
        if self.turn < len(self.steps) and total <= self.steps[-1]:
            raise ValueError(
                f"{type(self).__name__} changes what it trains after {self.steps[-1]} optimizer steps, but the "
                f"training ends after {total:.0f}: train longer, or give it shorter phases."
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.turn < len(self.steps) and trainer.global_step >= self.steps[self.turn]:
            with torch.no_grad():
                anew = self.change(self.turn)
            self.turn += 1
            for optimizer in trainer.optimizers if anew else ():
                optimizer.state.clear()


class MultiPhaseDeltas(MultiPhase):
    """Phases of weight deltas."""

    def flattened(self) -> bool:
        return any(delta.mask is not None and delta.value.shape != delta.mask.shape for delta in self.deltas())

    def has_chosen(self) -> bool:
        return any(delta.mask is not None and not delta.mask.all() for delta in self.deltas())

    def deltas(self) -> list[Delta]:
        """Return this callback's deltas, in order."""
        from lightning_peft.tuners.weight_deltas.masks import deltas

        assert self.stack is not None
        return deltas(self.stack.backbone, self.name)


def mask_of(delta: Delta) -> Tensor:
    """Return the mask of a delta that has one."""
    assert delta.mask is not None
    return delta.mask


def trained(delta: Delta) -> Tensor:
    """Return the whole of a delta, also where it is spread over processes."""
    return whole(delta.value.detach())


def assign(delta: Delta, value: Tensor) -> None:
    """Set the whole of a delta."""
    write(delta.value, value)


keep_old_names(__name__)
