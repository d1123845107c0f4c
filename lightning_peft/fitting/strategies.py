"""Adapters on several devices: what cannot work is refused at the start, the rest is arranged."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from torch import nn

from lightning_peft.backbone.quantization import is_quantized
from lightning_peft.backbone.sharded import has_shards, is_sharded, write
from lightning_peft.fitting.checkpoint_files import check_readable
from lightning_peft.fitting.checkpoint_names import checkpoint_names
from lightning_peft.fitting.checkpoints import restore_adapters, restore_sharded
from lightning_peft.fitting.lightning_private import saves_shards
from lightning_peft.fitting.shards import INDEX, read_index
from lightning_peft.stack.stack import AdapterStack, find_stacks

_FILTERED = "_lightning_peft_filter"


def prepare(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Check and set the Trainer's strategy before anything is injected.

    DeepSpeed writes its own files and is set to leave frozen weights out. `ModelParallelStrategy` (FSDP2) saves and
    loads the content of `module.state_dict()`, which is the checkpoint's entries while it runs.

    Raises:
        ValueError: a strategy whose checkpoints cannot hold an adapter alone, or that cannot clip or quantise; or a
            folder of shards to be resumed whose index would run code.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy):
        strategy.exclude_frozen_parameters = True
    elif isinstance(strategy, FSDPStrategy):
        check_fsdp(trainer, strategy, module)
    elif isinstance(strategy, ModelParallelStrategy):
        if trainer.ckpt_path is not None and Path(trainer.ckpt_path, INDEX).is_file():
            read_index(Path(trainer.ckpt_path))  # which the strategy will unpickle, whatever it holds
        _save_adapters_only(module)


def trained_names(module: nn.Module) -> set[str]:
    """Return the names of trained parameters."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def check_unchanged(trainer: L.Trainer, module: nn.Module, start: set[str]) -> None:
    """Raise `ValueError` where DDP would not average a gradient, as other parameters are trained than at its start.

    Args:
        trainer: the running Trainer.
        module: the LightningModule.
        start: the names of parameters trained when DDP was set up.
    """
    if isinstance(trainer.strategy, DDPStrategy) and (later := sorted(trained_names(module) - start)):
        raise ValueError(
            f"{len(later)} weights were unfrozen after DDP was set up and would be trained differently in every "
            f"process, the first is {later[0]}: unfreeze them before fit."
        )


def release(module: nn.Module) -> None:
    """Undo `prepare`."""
    handle = module.__dict__.pop(_FILTERED, None)
    if handle is not None:
        handle.remove()


def check_fsdp(trainer: L.Trainer, strategy: FSDPStrategy, module: nn.Module) -> None:
    """Raise `ValueError` where the first FSDP would fail later, and obscurely."""
    if saves_shards(strategy):
        raise ValueError(
            "FSDP's sharded checkpoints can only be loaded with every weight of the backbone in them: use "
            'FSDPStrategy(state_dict_type="full"), or ModelParallelStrategy.'
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm in (None, "norm"):
        raise ValueError(
            "FSDP in Lightning cannot clip gradients by norm: use "
            'Trainer(gradient_clip_algorithm="value"), or ModelParallelStrategy.'
        )
    if quantised := [n for n, m in module.named_modules() if is_quantized(m)]:
        raise ValueError(
            f"FSDP cannot shard weights quantised by bitsandbytes, the first is {quantised[0]}: use "
            'strategy="ddp", or do not quantise.'
        )


@contextmanager
def same_on_every_rank(module: nn.Module, stack: AdapterStack) -> Iterator[None]:
    """Make every process begin with rank 0's adapters, whether or not the user seeds.

    DDP copies rank 0's module at wrapping, FSDP2 does not: each process would contribute a part of its own adapter.
    The random numbers inside are rank 0's (some methods change the base by a random decomposition), and adapters that
    were made before the processes knew of each other are copied.
    """
    trainer = module._trainer if isinstance(module, L.LightningModule) else None
    if trainer is None or trainer.state.status != TrainerStatus.RUNNING or trainer.world_size == 1:
        yield
        return
    rng_state = torch.get_rng_state()
    shared = trainer.strategy.broadcast(rng_state)
    torch.set_rng_state(shared)
    try:
        yield
    finally:
        if not torch.equal(rng_state, shared):  # where all were seeded alike, all go on alike
            torch.set_rng_state(rng_state)
    live = {name: value for part in stack.parts for name, value in stack.live(part).items()}
    ours = {name: value for name, value in live.items() if not is_sharded(value) and not value.is_meta}
    sent = trainer.strategy.broadcast({name: value.detach().cpu() for name, value in ours.items()})
    for name, value in ours.items():
        write(value, sent[name])


def check_whole(module: nn.Module, backbone: nn.Module, callback: str) -> None:
    """Raise `ValueError` where a backbone is already spread over processes, too late to put an adapter on it."""
    if has_shards(backbone):
        raise ValueError(
            f"The backbone of {type(module).__name__} is sharded before it has its adapter: build it in __init__, or "
            f"call {callback}.apply(self) in configure_model between building and sharding."
        )


def restore_loaded(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Check, and complete, the state that a strategy loaded into the module without calling any hook."""
    if isinstance(module.trainer.strategy, ModelParallelStrategy):
        restore_sharded(module, module.trainer.ckpt_path)  # type: ignore[arg-type]
    else:
        restore_adapters(module, checkpoint, "the checkpoint")  # its weights are gone: base and settings remain


def explain(module: L.LightningModule, error: BaseException) -> None:
    """Explain in one sentence why a strategy could not load a checkpoint, before any hook was called.

    PyTorch names the place where a file is broken and, for FSDP2, the first tensor that differs.

    Raises:
        AdapterError: as `restore_adapters`, where that is why.
    """
    trainer = module._trainer
    path = None if trainer is None else trainer.ckpt_path
    if trainer is None or path is None or not Path(path).exists():
        return
    load = type(trainer.strategy).load_checkpoint.__code__
    if any(frame.f_code is load for frame, _ in traceback.walk_tb(error.__traceback__)):
        if isinstance(trainer.strategy, ModelParallelStrategy):
            restore_sharded(module, path)
        elif Path(path).is_file():
            check_readable(path)


def _save_adapters_only(module: nn.Module) -> None:
    if _FILTERED not in module.__dict__:
        module.__dict__[_FILTERED] = module.register_state_dict_post_hook(_filter)


def _filter(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Remove from a module's state, in place, the tensors that a checkpoint of its adapters leaves out."""
    stacks = find_stacks(module)
    if stacks and not prefix:
        names = set(checkpoint_names(module, stacks, state).values())
        for name in state.keys() - names:
            del state[name]
