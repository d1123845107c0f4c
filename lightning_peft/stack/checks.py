"""The checks of a backbone and a configuration before an adapter is put on."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection
from numbers import Real
from typing import TYPE_CHECKING

from torch import nn

from lightning_peft.backbone.fused import check_called
from lightning_peft.backbone.modules import base_modules
from lightning_peft.backbone.nearest_names import nearest_clause
from lightning_peft.backbone.peft_private import adapters_on
from lightning_peft.stack.adapter_files.names import check_folder_name

if TYPE_CHECKING:
    from peft import PeftConfig


def check_strangers(backbone: nn.Module, ours: Collection[str]) -> None:
    """Raise `ValueError` where peft itself put an adapter on: it would be switched off, and left out of checkpoints.

    Args:
        backbone: the model.
        ours: the names of the adapters of its stacks.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in backbone.modules() if isinstance(m, BaseTunerLayer)]
    if strangers := {name for layer in layers for name in adapters_on(layer)} - set(ours):
        raise ValueError(
            f"The backbone already carries an adapter of peft's own, {min(strangers)!r}: merge it "
            "(`merge_and_unload`), or put it on by `load_adapter`."
        )


def check_name(name: str, backbone: nn.Module) -> None:
    """Check that an adapter's name can be a folder's, and that peft, which sorts tensors by it, finds no other."""
    check_folder_name(name, "An adapter's name")
    if any(name in module.split(".") for module, _ in backbone.named_modules()):
        raise ValueError(f"{name!r} is the name of a module of the backbone: give the adapter another name.")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{name!r} is the name of an attribute of every module: give the adapter another name.")


def check_scale(scale: object) -> None:
    """Raise `ValueError` unless a dial is turned to a finite number."""
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise ValueError(f"The scale must be a finite number, 1 as saved and 0 off, got {scale!r}.")


def check_containers(backbone: nn.Module, layers: Collection[nn.Module], others: Collection[str]) -> None:
    """Check that no other adapter is called as what holds the tensors of one in its layers, such as `lora_A`.

    peft sorts tensors by a name anywhere in their keys, so that the other would be given them.

    Args:
        backbone: the model.
        layers: those of an adapter.
        others: the names of the other adapters.
    """
    containers = {name for layer in layers for name, _ in layer.named_children()}
    containers |= {name.rpartition(".")[2] for name, module in backbone.named_modules() if module in layers}
    if taken := sorted(containers & set(others)):
        raise ValueError(
            f"The adapter {taken[0]!r} is called as what this one keeps its tensors under, and would be given them: "
            "give that one another name."
        )


def check_targets(config: PeftConfig, backbone: nn.Module) -> None:
    """Check that every target in a list exists (peft is content if one of them does), and is called."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = copy.deepcopy(config)
    convert_peft_config_for_transformers(config, backbone, None)  # names of older models, as peft will read them
    targets = getattr(config, "target_modules", None)
    modules = [name for name, _ in base_modules(backbone) if name]
    if isinstance(targets, str):
        check_called((name for name in modules if re.fullmatch(targets, name)), backbone)
        return
    for target in sorted(targets or ()):
        matches = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not matches:
            near = nearest_clause(target, modules)
            raise ValueError(f"No module of the backbone is called {target!r}{near}.")
        check_called(matches, backbone)
