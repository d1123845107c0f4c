"""Choose a backbone's matrices to adapt where nobody names any: peft's choice, or all that can be adapted."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_peft.backbone.fused import never_called, read_by_kernels
from lightning_peft.backbone.modules import base_modules, is_linear, is_matrix
from lightning_peft.backbone.quantization import is_quantized
from lightning_peft.backbone.structure import is_fused
from lightning_peft.backbone.task_heads import task_heads


def default_targets(backbone: nn.Module) -> list[str] | str:
    """Return peft's own choice for the model's type, else the names that `every_matrix` finds.

    Args:
        backbone: a transformers model or any module.

    Raises:
        ValueError: nothing in the backbone can be adapted.

    Warns:
        UserWarning: most of the weights are in modules that are not among them; the largest is named.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    known = known_targets(backbone, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
    if known:
        return known
    names = unambiguous(backbone, every_matrix(backbone))
    _warn_of_the_rest(backbone, names)
    return names


def known_targets(backbone: nn.Module, mapping: Mapping[str, Sequence[str]]) -> list[str] | str | None:
    """Return the entry for the model's type in a table of peft's, as far as this model has such modules, else None.

    transformers renames modules, and the tables keep names of other releases.
    """
    known = mapping.get(getattr(getattr(backbone, "config", None), "model_type", ""))
    names = [name for name, _ in base_modules(backbone)]
    if isinstance(known, str):  # a regular expression
        return known if any(re.fullmatch(known, name) for name in names) else None
    return [k for k in known or () if any(name == k or name.endswith(f".{k}") for name in names)] or None


def every_matrix(backbone: nn.Module) -> list[str]:
    """Return the full names of all linear layers but the output embedding; in a net of convolutions, of these too.

    Left out are layers that an adapter could not act on: those whose weights are read without calling them, and
    subclasses of `nn.Linear` that compute something else, such as a router that gives a choice. A net with at least
    one convolution for two linear layers has its convolutions adapted, depthwise ones not, and its linear layers but
    those of its head, see `task_heads`, or where that cannot be told the last.

    Raises:
        ValueError: there are neither.
    """
    get_output = getattr(backbone, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    unreached = {"", *never_called(backbone), *read_by_kernels(backbone)}
    modules = {n: module for n, module in base_modules(backbone) if n not in unreached and module is not output}
    able = {name: module for name, module in modules.items() if is_matrix(module) and takes_adapters(module)}
    linear = [name for name, module in able.items() if is_linear(module)]
    convolutions = [name for name in able if name not in set(linear)]
    if 2 * len(convolutions) < len(linear):
        return linear
    heads = task_heads(backbone) or linear[-1:]
    if names := [name for name in able if not any(f"{name}.".startswith(f"{head}.") for head in heads)]:
        return names
    raise ValueError(f"{type(backbone).__name__} has no linear layer to adapt; {_advice(backbone)}.")


def unambiguous(backbone: nn.Module, names: list[str]) -> list[str]:
    """Return the names of modules that peft does not take for the experts of older models; all where none is left."""
    taken = taken_for_experts(backbone)
    return [name for name in names if name.rpartition(".")[2] not in taken] or names


def taken_for_experts(backbone: nn.Module) -> set[str]:
    """Return the last parts of names under which peft's LoRA adapts a mixture's fused experts, in every block.

    In transformers 4 each expert had modules of these names. A shared expert, or the plain feed-forward part of a
    first block, still has them, and would not be adapted: those are to be given to peft as parameters.
    """
    from peft.utils import transformers_weight_conversion as conversion

    model_type = getattr(getattr(backbone, "config", None), "model_type", None)
    if model_type is None or conversion.get_checkpoint_conversion_mapping(model_type) is None:
        return set()
    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type, "")
    return set(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, ()))


def all_linear(backbone: nn.Module) -> list[str]:
    """Return the full names of the linear layers that `"all-linear"` means, without those no adapter can act on."""
    named = dict(base_modules(backbone))
    return [name for name in every_matrix(backbone) if is_linear(named[name])]


def is_every_linear(backbone: nn.Module) -> bool:
    """Return whether peft's `"all-linear"` reaches all of the backbone's linear layers, and none it cannot adapt."""
    if never_called(backbone) or read_by_kernels(backbone):
        return False
    linear = {name: module for name, module in base_modules(backbone) if is_linear(module)}
    taken = taken_for_experts(backbone)
    return all(takes_adapters(m) and name.rpartition(".")[2] not in taken for name, m in linear.items())


@torch.no_grad()
def takes_adapters(module: nn.Module) -> bool:
    """Return whether a linear layer or convolution computes what adapters take it to compute.

    A depthwise convolution has no matrix of low rank, and a subclass of `nn.Linear` may give anything: it is tried.
    """
    if getattr(module, "groups", 1) != 1:
        return False
    if type(module).forward is nn.Linear.forward or not isinstance(module, nn.Linear) or is_quantized(module):
        return True
    x = torch.zeros(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        y = type(module).forward(module, x)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
    return isinstance(y, Tensor) and y.shape == (1, module.out_features)


def _warn_of_the_rest(backbone: nn.Module, names: list[str]) -> None:
    """Warn where the modules adapted by default hold less than half of the weights."""
    get_output = getattr(backbone, "get_output_embeddings", None)
    output, chosen = get_output() if callable(get_output) else None, set(names)
    unreached = {*never_called(backbone), *read_by_kernels(backbone)}
    sizes = {
        name: size
        for name, module in base_modules(backbone)
        if not isinstance(module, nn.Embedding)
        and name not in unreached
        and module is not output
        and (size := sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1))
    }
    inside = sum(size for name, size in sizes.items() if name in chosen)
    if 2 * inside < sum(sizes.values()):
        rest: dict[str, int] = {name: size for name, size in sizes.items() if name not in chosen}
        largest = max(rest, key=lambda name: rest[name])
        kind = type(dict(base_modules(backbone))[largest]).__name__
        warnings.warn(
            f"By default {len(names)} modules of {type(backbone).__name__} are adapted, {names[0]} the first, which "
            f"hold {inside / sum(sizes.values()):.0%} of its weights; the largest of the others is {largest} ({kind}): "
            f"{_advice(backbone)}.",
            stacklevel=3,
        )


def _advice(backbone: nn.Module) -> str:
    for name, module in base_modules(backbone):
        if isinstance(module, nn.RNNBase):
            layer = f"{name or 'it'}, a recurrent layer on which such adapters cannot act,"
            return f"name the target_modules, or train {layer} by FullFineTuning"
        if any(is_fused(module, parameter) for parameter in module.parameters(recurse=False)):
            return 'name the target_modules, or adapt the experts by LoRA(within="mlp") or LoRA(target_parameters=…)'
    return "name the target_modules"
