"""Quantise the linear layers of any module in place, and tell a quantised one from others."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lightning_peft.backbone.modules import base_modules
from lightning_peft.backbone.nearest_names import nearest_clause
from lightning_peft.backbone.task_heads import task_heads

QuantType = Literal["nf4", "fp4", "int8"]
_FLAGS = {"is_loaded_in_4bit": "Linear4bit", "is_loaded_in_8bit": "Linear8bitLt"}  # bitsandbytes' classes
_FLOAT32 = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")  # transformers' names
_TYPES = ("nf4", "fp4", "int8")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Quantization:
    """The settings of a quantisation.

    Args:
        quant_type: `"nf4"` (quantiles of a normal distribution), `"fp4"`, both in blocks of 64 values with a scale
            each, or `"int8"` with a scale for each output (Dettmers et al. 2022, arXiv:2208.07339).
        double_quant: quantise the scales of 4-bit blocks as well, in blocks of 256: 4.127 instead of 4.5 bits for
            each weight. Without meaning for int8.
        compute_dtype: `"float32"`, `"bfloat16"` or `"float16"`: what 4-bit layers compute in; None is the precision
            the layer would otherwise compute in.
        threshold: columns of the input with a value above it are kept out of int8; 0 keeps none out. The paper's 6.0
            makes the result of a row depend on the rows beside it.

    Raises:
        ValueError: a value is none of these.
    """

    quant_type: QuantType = "nf4"
    double_quant: bool = True
    compute_dtype: str | None = None
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.quant_type not in _TYPES:
            raise ValueError(f'quant_type must be "nf4", "fp4" or "int8", got {self.quant_type!r}.')
        if self.compute_dtype is not None and self.compute_dtype not in _DTYPES:
            raise ValueError(f"compute_dtype must be one of {', '.join(_DTYPES)}, got {self.compute_dtype!r}.")
        if not self.threshold >= 0:
            raise ValueError(f"threshold must not be negative, got {self.threshold}.")
        if self.quant_type == "int8" and self.compute_dtype is not None:
            raise ValueError('quant_type="int8" computes in integers: leave compute_dtype out.')


def quantize(
    backbone: nn.Module,
    how: Quantization | None = None,
    skip: Collection[str] | None = None,
    device: torch.device | None = None,
) -> list[str]:
    """Replace every `nn.Linear` (and transformers' `Conv1D`) of a module by its quantised twin, in place.

    Left as they are: what `skip` names, task heads and output embeddings, what transformers keeps in
    float32, weights that another module shares, and subclasses of `nn.Linear`. A backbone that is quantised already is
    only checked, so that calling this again does nothing.

    Args:
        backbone: any module without adapters.
        how: what to quantise to; default NF4 with double quantisation, as in QLoRA (Dettmers et al. 2023,
            arXiv:2305.14314).
        skip: names, or ends of names, of modules to leave as they are, and all that is inside them.
        device: where each weight is moved for quantising, and stays; default, where it is.

    Returns:
        The names of the quantised layers.

    Raises:
        ValueError: there is nothing to quantise, a name in `skip` does not exist, or the backbone has adapters on its
            full weights, or is quantised in another way.
        ModuleNotFoundError: bitsandbytes is not installed.

    Example:
        >>> from torch import nn
        >>> from lightning_peft.backbone.quantization import quantize, weight_bytes
        >>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        >>> quantize(model, skip=["2"])
        ['0']
        >>> weight_bytes(model[0]) / (512 * 512) < 0.53
        True
    """
    how = how or Quantization()
    layers = _import_layers()
    existing = dict(quantized_layers(backbone))
    if existing:
        _check_same(existing, how, layers)
    else:
        chosen = _chosen(backbone, skip or ())
        dtype = None if how.compute_dtype is None else getattr(torch, how.compute_dtype)
        for name, linear in chosen.items():
            if device is not None and not linear.weight.is_meta:
                linear.to(device)
            twin = layers.make(linear, _is_conv1d(linear), how.quant_type, how.double_quant, dtype, how.threshold)
            twin.source_cls = type(linear)  # as transformers calls it
            existing[name] = twin
            _replace(backbone, linear, twin)
            linear.weight.requires_grad_(False)  # an optimizer that was made before may hold it, and must let it go
    for layer in existing.values():
        layers.adopt(layer)
    mark(backbone)
    for module in backbone.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # PyTorch's fused inference reads the weights of linear layers
    return list(existing)


def protect(module: nn.Module) -> None:
    """Keep 4-bit layers of bitsandbytes from changing while they are used; what they compute stays the same."""
    for part in list(module.modules()):
        if _descends(part, "Linear4bit"):
            _import_layers().protect(part)


def mark(module: nn.Module) -> None:
    """Set, on whatever holds quantised layers, the flags by which peft chooses its own layers."""
    for part in module.modules():
        for flag, cls in _FLAGS.items():
            holds = any(_descends(inner, cls) for inner in part.modules())
            if holds or hasattr(part, flag):
                setattr(part, flag, holds)


def dequantize(backbone: nn.Module) -> list[str]:
    """Put full-precision layers back, in place, with the values that the quantised ones compute with.

    An adapter that was trained on the quantised model can be loaded on the result and merged into it.

    Args:
        backbone: a quantised module without adapters.

    Returns:
        The names of the layers.

    Raises:
        ValueError: it has adapters.
    """
    existing = dict(quantized_layers(backbone))
    if existing and _has_adapters(backbone):
        raise ValueError("The quantised backbone has adapters: dequantise it before loading them.")
    for layer in existing.values():
        weight = _import_layers().weight_of(layer)
        outputs, inputs = weight.shape
        with torch.device("meta"):
            full: Any = layer.source_cls(outputs, inputs) if was_conv1d(layer) else nn.Linear(inputs, outputs)
        weight = weight.T.contiguous() if was_conv1d(layer) else weight
        full.weight, full.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        _replace(backbone, layer, full.train(layer.training))
    mark(backbone)
    return list(existing)


def quantized_layers(backbone: nn.Module) -> Iterator[tuple[str, Any]]:
    """Return the backbone's own quantised linear layers, by the names they have without adapters."""
    return ((name, module) for name, module in base_modules(backbone) if is_quantized(module))


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module is a linear layer quantised by bitsandbytes; that is not imported for it."""
    return any(_descends(module, cls) for cls in _FLAGS.values())


def was_conv1d(module: nn.Module) -> bool:
    """Return whether a quantised layer took the place of a transformers `Conv1D`, whose weight is transposed."""
    return getattr(getattr(module, "source_cls", None), "__name__", None) == "Conv1D"


def check_merge(layers: Iterable[Any], method: str) -> None:
    """Raise `ValueError` where weights that an adapter would be written into are quantised.

    It would be rounded to what it is to correct, and the weights could not be brought back.

    Args:
        layers: the adapter's layers (peft's `BaseTunerLayer`).
        method: what to call it.
    """
    if any(is_quantized(layer.get_base_layer()) for layer in layers):
        raise ValueError(
            f"{method} cannot be merged into quantised weights, which would be rounded again: load it on the model "
            "without Quantize, or on one after lightning_peft.backbone.quantization.dequantize(model), and merge there."
        )


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes that the weights of quantised layers take: packed values, scales and code tables."""
    return sum(t.nbytes for _, layer in quantized_layers(module) for t in _import_layers().stored(layer))


def _import_layers() -> Any:
    try:
        return importlib.import_module("lightning_peft.backbone.quantized_layers")
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            raise
        message = "Quantisation needs bitsandbytes, which is not installed: pip install lightning-peft[quantization]."
        raise ModuleNotFoundError(message, name="bitsandbytes") from error


def _check_same(existing: dict[str, Any], how: Quantization, layers: Any) -> None:
    expected = {"quant_type": how.quant_type, "double_quant": how.double_quant}
    for name, layer in existing.items():
        settings = layers.settings_of(layer)
        if different := [f"{key}={value!r}" for key, value in settings.items() if value != expected[key]]:
            requested = ", ".join(f"{key}={expected[key]!r}" for key in settings)
            raise ValueError(f"{name} is quantised already with {', '.join(different)}, but {requested} is asked for.")


def _chosen(backbone: nn.Module, skip: Collection[str]) -> dict[str, Any]:
    """Return the layers to quantise, by name."""
    if _has_adapters(backbone):
        raise ValueError(
            f"{type(backbone).__name__} already has adapters on its full weights: quantise it before adding any."
        )
    names = [name for name, _ in backbone.named_modules() if name]
    for name in skip:
        if not any(n == name or n.endswith(f".{name}") for n in names):
            near = nearest_clause(name, names)
            raise ValueError(f"No module of the backbone is called {name!r}{near}.")
    # some of these are asked by their parents for the dtype to compute in, such as T5's wo
    float32_names = {name for m in backbone.modules() for key in _FLOAT32 for name in getattr(m, key, None) or ()}
    left = _heads(backbone) | {m for head in task_heads(backbone) for m in backbone.get_submodule(head).modules()}
    for n, module in backbone.named_modules():
        if any(n == name or n.endswith(f".{name}") for name in skip) or float32_names & set(n.split(".")):
            left |= set(module.modules())
    shared = _shared(backbone)
    # a subclass of nn.Linear has some reason of its own to be one, such as a parent that reads its weight
    chosen = {
        name: module
        for name, module in backbone.named_modules()
        if name
        and (type(module) is nn.Linear or _is_conv1d(module))
        and module not in left
        and not shared & {id(parameter) for parameter in module.parameters()}
    }
    if not chosen:
        raise ValueError(f"{type(backbone).__name__} has no linear layer to quantise.")
    return chosen


def _has_adapters(backbone: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in backbone.modules())


def _descends(module: nn.Module, cls: str) -> bool:
    return any(c.__name__ == cls and c.__module__.startswith("bitsandbytes.") for c in type(module).__mro__)


def _heads(backbone: Any) -> set[nn.Module]:
    """Return what makes a transformers model's outputs: all outside its base model, and its output embedding."""
    inner = getattr(backbone, "base_model", None) if hasattr(backbone, "base_model_prefix") else None
    outside: set[nn.Module] = set()
    if isinstance(inner, nn.Module) and inner is not backbone:
        outside |= set(backbone.modules()) - set(inner.modules())
    get_output = getattr(backbone, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    return outside | ({output} if isinstance(output, nn.Module) else set())


def _shared(backbone: nn.Module) -> set[int]:
    """Return the ids of the parameters that more than one module holds."""
    owners: dict[int, set[nn.Module]] = {}
    for module in backbone.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(module)
    return {parameter for parameter, modules in owners.items() if len(modules) > 1}


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _replace(backbone: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put one module in the place of another, under each of the names it has."""
    for parent in list(backbone.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
