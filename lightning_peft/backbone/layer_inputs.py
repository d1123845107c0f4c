"""The kinds of layers that methods are made for, and an input that a layer takes, by its own shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.modules import is_linear
from lightning_peft.backbone.quantization import is_quantized
from lightning_peft.backbone.sharded import has_shards
from lightning_peft.backbone.structure import matrix_shape


def layer_input(layer: nn.Module, seed: int = 0) -> Tensor | None:
    """Return an input for a linear layer, a convolution or an embedding, in its precision; None for all else.

    None too where nothing can be tried: without values, on several devices, in packed weights.
    """
    weight: Any = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or is_quantized(layer) or has_shards(layer):
        return None
    if not weight.is_floating_point():
        return None
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, layer.num_embeddings, (2, 3), generator=generator).to(weight.device)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        shape = (2, layer.in_channels, *_extent(layer))
    elif is_linear(layer):
        shape = (3, matrix_shape(layer)[0])
    else:
        return None
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)


def is_plain(layer: nn.Module) -> bool:
    """Return whether a layer is exactly a matrix product with a weight of its own, which every method is made for."""
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

    plain = type(layer) in (nn.Linear, NonDynamicallyQuantizableLinear) or type(layer).__name__ == "Conv1D"
    return plain and not computes_weight(layer)


def computes_weight(layer: nn.Module) -> bool:
    """Return whether a layer makes its weight anew in each call, as `weight_norm` and parametrizations do."""
    return hasattr(layer, "weight") and layer._parameters.get("weight") is None


def _extent(layer: Any) -> tuple[int, ...]:
    """Return a length for each dimension that a convolution slides over: its reach, its padding and two steps."""
    padding = [0] * len(layer.kernel_size) if isinstance(layer.padding, str) else layer.padding
    reach = ((k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
    return tuple(max(r, p + 1) + 2 * s for r, p, s in zip(reach, padding, layer.stride, strict=True))
