"""Swap a module's AdamW for bitsandbytes' paged one, whose state moves to the CPU's memory when the GPU's is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import lightning as L
from torch.optim import AdamW, Optimizer

from lightning_peft.replaced import replaced

PagedOptimizer = Literal["paged_adamw_8bit", "paged_adamw_32bit"]
_WRAPPED = "_wrapped_by_lr_sched"  # by which schedulers know that steps are noted
PAGED = ("paged_adamw_8bit", "paged_adamw_32bit")  # as transformers calls them


def page_optimizers(trainer: L.Trainer, kind: PagedOptimizer) -> None:
    """Put a paged AdamW in the place of each of the Trainer's optimizers, with the same groups and hyper-parameters.

    Called at fit start, before a checkpoint's optimizer state is restored. Schedulers go on with the new optimizers.
    On CPU bitsandbytes warns that nothing is paged; the steps are the same.

    Args:
        trainer: its strategy has set up the optimizers, and none has made a step.
        kind: `"paged_adamw_8bit"` (moments in 8 bits, for tensors of 4,096 values or more) or `"paged_adamw_32bit"`.

    Raises:
        ValueError: an optimizer is not AdamW, or uses an option that the paged one lacks.
    """
    paged = {optimizer: _paged(optimizer, kind) for optimizer in trainer.strategy.optimizers}
    trainer.strategy.optimizers = list(paged.values())
    for config in trainer.strategy.lr_scheduler_configs:
        for scheduler in _schedulers(config.scheduler):
            for attribute in ("optimizer", "_optimizer"):
                old = getattr(scheduler, attribute, None)
                if old in paged:
                    setattr(scheduler, attribute, paged[old])
                    _count_steps(paged[old])


def _paged(optimizer: Optimizer, kind: PagedOptimizer) -> Optimizer:
    import bitsandbytes as bnb

    classes = {"paged_adamw_8bit": bnb.optim.PagedAdamW8bit, "paged_adamw_32bit": bnb.optim.PagedAdamW32bit}
    if isinstance(optimizer, tuple(classes.values())):
        return optimizer
    if type(optimizer) is not AdamW:
        raise ValueError(
            f"paged_optimizer takes the place of torch.optim.AdamW, but the module has {type(optimizer).__name__}: "
            "give it AdamW, or leave paged_optimizer out."
        )
    for option in ("amsgrad", "maximize"):
        if any(group[option] for group in optimizer.param_groups):
            raise ValueError(f"The paged AdamW has no {option}: leave it out, or paged_optimizer.")
    # schedulers keep what they need in the groups, so these are carried over whole
    groups = [group | {"lr": float(group["lr"])} for group in optimizer.param_groups]
    keys = ("betas", "eps", "weight_decay")
    defaults = {"lr": float(optimizer.defaults["lr"]), **{key: optimizer.defaults[key] for key in keys}}
    return classes[kind](groups, **defaults)


def _schedulers(scheduler: Any) -> Iterator[Any]:
    """Yield a scheduler and those inside it."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _schedulers(inner)


def _count_steps(optimizer: Any) -> None:
    """Note each step, as schedulers do with the optimizer they are made for; without it they warn of their order."""
    if hasattr(optimizer.step, _WRAPPED):
        return

    def noted(step: Callable[..., object], *args: object, **kwargs: object) -> object:
        optimizer._opt_called = True
        return step(*args, **kwargs)

    setattr(replaced(optimizer, "step", noted), _WRAPPED, True)
