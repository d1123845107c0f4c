"""Training loops of one's own, with Fabric or bare: modes of the frozen backbone, checkpoints of adapters alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_peft.fitting.checkpoint_names import checkpoint_names
from lightning_peft.fitting.train_modes import set_modes
from lightning_peft.replaced import Handle, replaced, replacements
from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.stack import AdapterStack, check_same_keys, find_stacks

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def trained_only(module: nn.Module) -> Callable[[str, Any], bool]:
    """Return a filter for `fabric.save` that keeps the adapters and what else is trained, not the frozen backbone.

    Args:
        module: the module with its adapters, before or after `fabric.setup`.

    Raises:
        AdapterError: it has none.

    Example:
        >>> from torch import nn
        >>> from lightning_peft import trained_only
        >>> from lightning_peft.callbacks import LoRA
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> _ = LoRA(r=2, target_modules=["2"]).apply(net)
        >>> keep = trained_only(net)
        >>> [name for name, value in net.state_dict().items() if keep(name, value)]
        ['2.lora_A.lora.weight', '2.lora_B.lora.weight']
    """
    names = _trained_names(module)
    return lambda name, _: name in names


def load_trained(fabric: Fabric, path: str | Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Load a checkpoint that `fabric.save` wrote with the filter `trained_only`, checking that nothing is missing.

    Args:
        fabric: of the run that goes on.
        path: the file.
        state: as for `fabric.load`; its modules have their adapters already.

    Returns:
        What `fabric.load` returns: entries that `state` does not have.

    Raises:
        AdapterError: a module's trained tensors are not those in the file.
    """
    saved = fabric.load(path)
    for key, value in state.items():
        if isinstance(value, nn.Module):
            if not isinstance(saved.get(key), dict):
                raise AdapterError(f"{path} holds no module {key!r}, but {', '.join(map(repr, saved))}.")
            check_same_keys(_trained_names(value), set(saved[key]), f"{path} and the module {key!r}")
    return fabric.load(path, dict(state), strict=False)


def keep_modes(stack: AdapterStack, dropout: bool) -> None:
    """Let `train()` put adapters alone in training mode as long as there are any, as a Trainer's callbacks do.

    Args:
        stack: of the backbone.
        dropout: keep the dropout of the frozen backbone.
    """
    if not replacements(stack.backbone, "train", _Modes):
        stack.while_adapted(_Modes(stack.backbone, dropout))


class _Modes(Handle):
    """A backbone's `train` in which frozen parts are evaluated; copied and pickled with the backbone."""

    def __init__(self, backbone: nn.Module, dropout: bool) -> None:
        self.backbone, self.dropout, self._setting = backbone, dropout, False
        self._handle = replaced(backbone, "train", self.train)

    def train(self, original: Callable[[bool], nn.Module], mode: bool = True) -> nn.Module:
        """Set the modes; within, `train` is the backbone's own."""
        if self._setting or not mode:
            return original(mode)
        self._setting = True
        try:
            set_modes(self.backbone, self.dropout)
        finally:
            self._setting = False
        return self.backbone

    def remove(self) -> None:
        self._handle.remove()


def _trained_names(module: nn.Module) -> set[str]:
    """Return the names in the state of what is trained, as Fabric saves it: of the module that it has wrapped."""
    from lightning.fabric.wrappers import is_wrapped

    inner: Any = module
    while is_wrapped(inner):
        inner = inner.module
    if not (stacks := find_stacks(inner)):
        raise AdapterError(f"{type(inner).__name__} has no adapters: put them on before, with a callback's apply.")
    return set(checkpoint_names(inner, stacks, inner.state_dict(keep_vars=True)).values())
