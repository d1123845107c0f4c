"""The norms of a backbone, which LoRETTA's authors train beside the tensor trains."""

from __future__ import annotations

from torch import nn

from lightning_peft.backbone.modules import base_modules
from lightning_peft.backbone.targets import Layers
from lightning_peft.tuners.weight_deltas.choice import choose_parameters


def choose_norms(backbone: nn.Module, layers: Layers | list[int] | None = None) -> list[str]:
    """Return the full names of the parameters of the backbone's norms.

    Args:
        backbone: any module, with or without adapters.
        layers: those in which blocks; default all, the ones outside the blocks too.

    Raises:
        ValueError: it has none there.
    """
    owners = {name for name, module in base_modules(backbone) if "Norm" in type(module).__name__}
    chosen = [name for name in choose_parameters(backbone, layers) if name.rpartition(".")[0] in owners]
    if not chosen:
        raise ValueError(f"{type(backbone).__name__} has no norms to train there: leave out train_norms.")
    return chosen
