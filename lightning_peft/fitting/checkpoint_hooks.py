"""A module's own checkpoint hooks keep and restore its adapters, as long as it has any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L

from lightning_peft.backbone.quantization import protect
from lightning_peft.fitting.checkpoints import fill_in, keep_adapters, restore_adapters
from lightning_peft.fitting.finite import check_finite_tensors
from lightning_peft.fitting.lightning_private import load_loosely
from lightning_peft.fitting.strategies import restore_loaded
from lightning_peft.replaced import Handle, replaced, replacements
from lightning_peft.stack.stack import AdapterStack, find_stacks

_SAVE = "on_save_checkpoint"


def hook_checkpoints(module: L.LightningModule, stack: AdapterStack, finite: bool) -> None:
    """Let the module's checkpoint hooks keep and restore adapters; they run for weights-only files as well.

    Loading is no longer strict, since the backbone is not in the file; the hook checks every key instead. Hooks set
    on the module itself before are called too. All is undone when the last adapter is taken off.

    Args:
        module: the LightningModule.
        stack: adapters of one of its backbones.
        finite: whether a checkpoint is refused that would hold a number that is not finite.
    """
    if links := replacements(module, _SAVE, CheckpointHooks):
        hooks: CheckpointHooks = links[0].by.__self__  # type: ignore[attr-defined]
    else:
        protect(module)  # Lightning takes the whole module's state before any hook is called
        hooks = CheckpointHooks(module)
    hooks.finite = finite
    stack.while_adapted(hooks)


class CheckpointHooks(Handle):
    """Wrap a module's `on_save_checkpoint` and `on_load_checkpoint`; copied and pickled with the module."""

    def __init__(self, module: L.LightningModule) -> None:
        self.module, self.finite = module, True
        self._handles: list[Handle] = [
            load_loosely(module),
            replaced(module, _SAVE, self.save),
            replaced(module, "on_load_checkpoint", self.load),
        ]

    def save(self, original: Callable[..., object], checkpoint: dict[str, Any]) -> None:
        """Call the module's own hook with the whole state, then leave only trained tensors in the checkpoint."""
        if not find_stacks(self.module):  # the adapters of a copy have been taken off
            self.remove()
            original(checkpoint)
            return
        filled = fill_in(self.module, checkpoint)
        original(checkpoint)
        keep_adapters(self.module, checkpoint, filled)
        if self.finite:
            for stack in find_stacks(self.module).values():
                for part in stack.parts:
                    check_finite_tensors(stack.parameters(part), f"Adapter {part.name!r}")

    def load(self, original: Callable[..., object], checkpoint: dict[str, Any]) -> None:
        """Check and complete the checkpoint, then call the module's own hook."""
        if "state_dict" in checkpoint:
            # Lightning's averaging callbacks load both the average and the current weights strictly
            restore_adapters(self.module, checkpoint, "the checkpoint", complete="current_model_state" in checkpoint)
        else:
            restore_loaded(self.module, checkpoint)
        original(checkpoint)

    def remove(self) -> None:
        if not find_stacks(self.module):  # else another backbone of the module has adapters
            for handle in self._handles:
                handle.remove()
