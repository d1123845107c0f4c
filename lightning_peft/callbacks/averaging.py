"""An exponential moving average of what is trained, and of nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_peft.backbone.sharded import is_sharded, whole, write
from lightning_peft.fitting.checkpoints import fill_in
from lightning_peft.replaced import Handle, replaced
from lightning_peft.stack.stack import check_same_keys

Weights = dict[str, Tensor]


class AdapterEMA(Callback):
    """Evaluate, and end with, an exponential moving average of the trained weights: `a <- decay * a + (1 - decay) * w`.

    The first update copies the weights. In validation, after training and in every checkpoint's `state_dict` stands
    the average; training goes on from the weights themselves, which a checkpoint holds as this callback's state.

    Lightning's `EMAWeightAveraging` averages a copy of the whole module. This one

    - keeps only trainable parameters, so memory and checkpoints grow by the size of the adapter, not of the backbone;
    - may stand anywhere in the list of callbacks, and works with a backbone that is built or sharded after `setup`;
    - averages in float32 where the weights are half, in which a step of `1 - decay` would be rounded away;
    - puts the average into `ModelCheckpoint(save_weights_only=True)` too, where Lightning's leaves the last weights.

    Buffers (the statistics of a BatchNorm outside the backbone) are not averaged.

    Args:
        decay: in [0, 1); the average looks back about `1 / (1 - decay)` updates.
        every_n_steps: optimizer steps between updates.
        starting_at_step: optimizer steps before the first update; until then, there is no average.

    Raises:
        ValueError: an argument is out of range, or the strategy is DeepSpeed or the first FSDP.
        AdapterError: on resuming, where the checkpoint's weights are not those being trained.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import AdapterEMA, LoRA
        >>> trainer = L.Trainer(callbacks=[LoRA(r=8), AdapterEMA(decay=0.99)], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    def __init__(self, decay: float = 0.999, every_n_steps: int = 1, starting_at_step: int = 0) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}.")
        if every_n_steps < 1 or starting_at_step < 0:
            raise ValueError(
                "every_n_steps must be at least 1 and starting_at_step at least 0, "
                f"got {every_n_steps} and {starting_at_step}."
            )
        self.decay, self.every_n_steps, self.starting_at_step = decay, every_n_steps, starting_at_step
        self._hook: Handle | None = None
        self._forget()

    def _forget(self) -> None:
        self._average: Weights | None = None
        self._current: Weights | None = None  # the weights training goes on from, while the average is in their place
        self._restored: dict[str, Any] | None = None
        self._step = 0  # of the last update
        self._trained: Weights = {}

    # -- Lightning's hooks, in the order in which they run -----------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"{type(self).__name__} cannot read the shards of {type(trainer.strategy).__name__}: use "
                'strategy="ddp" or ModelParallelStrategy.'
            )
        if stage == "fit":
            self._unhook()  # a run that failed was not torn down
            self._forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        named = pl_module.named_parameters(remove_duplicate=False)  # a tied weight is saved under each of its names
        self._trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        self._hook = replaced(pl_module, "on_save_checkpoint", functools.partial(self._save, pl_module))
        if self._restored is not None and self._restored["current"]:
            self._go_on(self._restored)
        self._restored = None

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        if step == self._step or step <= self.starting_at_step or step % self.every_n_steps:
            return
        self._step = step
        if self._average is None:
            self._average = self._copies()
            return
        for name, average in self._average.items():
            average.lerp_(self._trained[name].detach().to(average.dtype), 1 - self.decay)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._show_average()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._show_current()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show_average()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._show_current()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._unhook()

    def state_dict(self) -> dict[str, Any]:
        current = self._current or self._trained
        average = self._average or {}
        return {
            "step": self._step,
            "current": {name: whole(current[name].detach()) for name in average},
            # the checkpoint's state_dict has the average in the weights' own precision
            "average": {n: whole(a) for n, a in average.items() if a.dtype != current[n].dtype},
        }

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    # -- what they do ------------------------------------------------------------------------------------------------

    def _copies(self) -> Weights:
        """Return the trained weights, in float32 where they are half."""
        values = {name: parameter.detach() for name, parameter in self._trained.items()}
        half = (torch.float16, torch.bfloat16)
        return {name: value.float() if value.dtype in half else value.clone() for name, value in values.items()}

    @torch.no_grad()
    def _go_on(self, restored: Mapping[str, Any]) -> None:
        """Take up an average and its weights again; the module was restored from `state_dict`, the average."""
        current = restored["current"]
        check_same_keys(set(self._trained), set(current), "The weights being trained and the checkpoint's average")
        self._average = self._copies()
        for name, parameter in self._trained.items():
            write(parameter, current[name])
        for name, value in restored["average"].items():
            write(self._average[name], value)
        self._step = restored["step"]

    @torch.no_grad()
    def _show_average(self) -> None:
        """Put the average in the place of the weights, which are kept."""
        if self._average is not None and self._current is None:
            self._current = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
            for name, average in self._average.items():
                self._trained[name].copy_(average)

    @torch.no_grad()
    def _show_current(self) -> None:
        """Put the weights back in their place."""
        if self._current is not None:
            for name, value in self._current.items():
                self._trained[name].copy_(value)
            self._current = None

    def _save(self, module: L.LightningModule, original: Callable[..., object], checkpoint: dict[str, Any]) -> None:
        """Save the average before a module's own `on_save_checkpoint`, which weights-only checkpoints run as well."""
        fill_in(module, checkpoint)
        self.put_average(checkpoint["state_dict"])
        original(checkpoint)

    def put_average(self, state: Weights) -> None:
        """Put the average into a module's state, in place of the weights; all processes must ask."""
        if self._average is None or self._current is not None:
            return
        sharded = any(is_sharded(value) for value in state.values())
        for name, average in self._average.items():
            value = average.to(self._trained[name].dtype)
            value = value if sharded else whole(value)
            if name in state:  # a state that is whole is on rank 0 alone
                state[name] = value.to(state[name].device)
