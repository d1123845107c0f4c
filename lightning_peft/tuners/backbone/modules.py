"""A backbone's own modules, as they are without adapters."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

STATE = "adapter_state"  # the backbone's child that holds what adapters have outside the backbone's own modules


class AdapterState(nn.ModuleDict):
    """Weights that adapters share between layers, and encoders of prompts: adapter -> its modules."""


def base_modules(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The backbone's own modules under the names they have without adapters, adapters' modules left out."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside: set[nn.Module] = set()
    for name, module in backbone.named_modules():
        if isinstance(module, BaseTunerLayer):
            inside |= set(module.modules()) - set(module.get_base_layer().modules())  # type: ignore[attr-defined]
        elif isinstance(module, AuxiliaryTrainingWrapper):  # a head that is trained whole keeps its original beside it
            inside |= set(module.modules()) - set(module.original_module.modules())  # type: ignore[operator, union-attr]
        elif isinstance(module, AdapterState):
            inside |= set(module.modules())
        if module not in inside:
            yield standalone_key(name + ".").rstrip("."), module


def state_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a module under the names they have in its `state_dict()`.

    That is not called: it may be a user's own, which leaves entries out or renames them, and some layers change when
    their state is taken. What adapters keep beside the modules is asked, since a prompt may follow from an encoder.
    """
    fsdp: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    found: dict[str, Any] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, fsdp):  # nothing but its own state knows the shapes of what it has flattened
            return nn.Module.state_dict(module, keep_vars=True)
        start = f"{name}." if name else ""
        if isinstance(part, AdapterState):
            found |= part.state_dict(prefix=start, keep_vars=True)
        for key, value in part._parameters.items():
            if value is not None:
                found[start + key] = value
        for key, buffer in part._buffers.items():
            if buffer is not None and key not in part._non_persistent_buffers_set:
                found[start + key] = buffer
    return found


def standalone_key(key: str) -> str:
    """A key as it would be if no other adapter wrapped the same module."""
    return re.sub(r"\.(base_layer|original_module)(?=\.)", "", key)


def eager_key(key: str) -> str:
    """A key as it was before `torch.compile` wrapped a module on its way."""
    return re.sub(r"(^|(?<=\.))_orig_mod\.", "", key)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module itself, where `torch.compile` has wrapped it; both share their weights, and run the same code."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix product: `nn.Linear` (quantised ones included) or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_matrix(module: nn.Module) -> bool:
    """Whether a module, or the one an adapter wraps, is a linear layer or a convolution."""
    base: Any = module.get_base_layer() if hasattr(module, "get_base_layer") else module  # type: ignore[operator]
    return is_linear(base) or isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d)
