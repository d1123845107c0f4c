"""A backbone's own modules, as they are without adapters."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_peft.backbone.parameter_order import parameter_order
from lightning_peft.backbone.peft_private import adapters_on, whole_wrapper

T = TypeVar("T")
_UNNAMED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")  # FSDP1, its checkpointing, compile

STATE = "adapter_state"  # the backbone's child that holds what adapters have outside the backbone's own modules


class AdapterState(nn.ModuleDict):
    """Weights that adapters share between layers, and encoders of prompts: adapter -> its modules."""


def base_modules(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the backbone's own modules under the names they have without adapters, adapters' modules left out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    whole = whole_wrapper()

    inside: set[nn.Module] = set()
    for name, module in backbone.named_modules():
        if isinstance(module, BaseTunerLayer):
            wrapper: Any = module
            inside |= set(wrapper.modules()) - set(wrapper.get_base_layer().modules())
        elif isinstance(module, whole):  # a head that is trained whole keeps its original beside it
            inside |= set(module.modules()) - set(module.original_module.modules())
        elif isinstance(module, AdapterState):
            inside |= set(module.modules())
        if module not in inside:
            yield bare_name(backbone, name), module


def bare_name(backbone: nn.Module, name: str) -> str:
    """Return the name that a module or tensor of the base has without adapters; most names are that already."""
    wrapped = "base_layer" in name or "original_module" in name
    return standalone_name(backbone, name) if wrapped else name


def state_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a module under the names they have in its `state_dict()`.

    `state_dict()` is not called: a user's own may leave entries out or rename them, and some layers change when their
    state is taken. Adapters' own state is asked for, since a prompt may follow from an encoder.
    """
    fsdp: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    tensors: dict[str, Any] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, fsdp):  # nothing but its own state knows the shapes of what it has flattened
            return nn.Module.state_dict(module, keep_vars=True)
        start = f"{name}." if name else ""
        if isinstance(part, AdapterState):
            tensors |= part.state_dict(prefix=start, keep_vars=True)
        for key, value in part._parameters.items():
            if value is not None:
                tensors[start + key] = value
        for key, buffer in part._buffers.items():
            if buffer is not None and key not in part._non_persistent_buffers_set:
                tensors[start + key] = buffer
    return tensors


def standalone_name(root: nn.Module, name: str, adapter: str | None = None) -> str:
    """Return a module's or tensor's name as it would be if one adapter alone were on the model.

    A wrapper puts `.base_layer` into the names of all that it wraps, and `.original_module` where it keeps a copy
    beside it. The latter, and the former of other adapters, are left out. An
    adapter's own stay, since peft nests several wrappers of one adapter where it adapts several parameters of one
    module, and the depth is all that tells their tensors apart.

    Args:
        root: what the name starts from.
        name: e.g. `"experts.base_layer.base_layer.lora_A.lora.weight"`; from where it leads to no module of `root`
            any more, it is kept as it is.
        adapter: whose wrappers stay; by default those of the adapter that the name itself names further on, so that
            a tensor or module of the base has the name it has without adapters.
    """
    whole = whole_wrapper()

    parts, new_parts = name.split("."), []
    module: nn.Module | None = root
    while parts:
        wrappers = [] if module is None else _wrappers(module := _seen_through(module, parts[0]))
        if wrappers:
            depth = 0
            while depth < len(wrappers) and parts[depth : depth + 1] == ["base_layer"]:
                depth += 1
            parts = parts[depth:]
            adapter_wrappers = [w for w in wrappers if adapters_on(w) & ({adapter} if adapter else set(parts))]
            new_parts += ["base_layer"] * _depth_alone(wrappers, adapter_wrappers, depth)
            module = [*wrappers, wrappers[-1].base_layer][depth]
        if parts:
            part = parts.pop(0)
            if not (part == "original_module" and isinstance(module, whole)):
                new_parts.append(part)
            module = None if module is None else module._modules.get(part)
    return ".".join(new_parts)


def _seen_through(module: nn.Module, child: str) -> nn.Module:
    """Return the module that has a child, where PyTorch's own wrappers leave themselves out of the child's name."""
    while child not in module._modules:
        inner = next((m for n in _UNNAMED if (m := module._modules.get(n)) is not None), None)
        if inner is None:
            break
        module = inner
    return module


def _wrappers(module: nn.Module) -> list[Any]:
    """Return the wrappers nested around one module, outermost first."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    nested = []
    while isinstance(module, BaseTunerLayer) and (base := module._modules.get("base_layer")) is not None:
        nested.append(module)
        module = _seen_through(base, "base_layer")
    return nested


def _depth_alone(wrappers: list[Any], adapter_wrappers: list[Any], depth: int) -> int:
    """Count an adapter's own wrappers that peft alone would put around the module at a depth of the nest."""
    at = wrappers[depth] if depth < len(wrappers) else None
    if at not in adapter_wrappers:
        return sum(wrapper in adapter_wrappers for wrapper in wrappers[:depth])
    # peft wraps a module once for each parameter, in the order in which the module registers them; in a stack, a
    # wrapper that another adapter has put there already is used again, so that the order may be another
    order = parameter_order(wrappers[-1].base_layer)
    names = [getattr(wrapper, "parameter_name", None) for wrapper in adapter_wrappers]
    if all(name in order for name in names):
        adapter_wrappers = sorted(adapter_wrappers, key=lambda wrapper: -order.index(wrapper.parameter_name))
    return adapter_wrappers.index(at)


def flat_key(key: str) -> str:
    """Return a key without any `.base_layer`, as checkpoints and folders had it before wrappers could be nested."""
    return re.sub(r"\.base_layer(?=\.)", "", key)


def with_nested_keys(tensors: Mapping[str, T], expected: Collection[str]) -> Mapping[str, T]:
    """Return saved tensors under the expected keys, where their flat keys tell all of them apart."""
    nested = {flat_key(key): key for key in expected}
    if set(tensors) == set(expected) or len(nested) < len(expected):
        return tensors
    renamed = {nested.get(flat_key(key), key): value for key, value in tensors.items()}
    return renamed if len(renamed) == len(tensors) else tensors


def eager_key(key: str) -> str:
    """Return a key as it was before `torch.compile` wrapped a module on its way."""
    return re.sub(r"(^|(?<=\.))_orig_mod\.", "", key)


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module itself, where `torch.compile` has wrapped it; both share weights, and run the same code."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a matrix product: `nn.Linear` (quantised ones included) or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_matrix(module: nn.Module) -> bool:
    """Return whether a module, or the one an adapter wraps, is a linear layer or a convolution."""
    base = getattr(module, "get_base_layer", lambda: module)()
    return is_linear(base) or isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d)
