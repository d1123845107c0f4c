"""The singular vectors of a weight, and a few numbers by which two computations of them are compared."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_peft.backbone.quantization import is_quantized
from lightning_peft.backbone.sharded import whole
from lightning_peft.backbone.structure import matrix_shape

SKETCH_SIZE = 8
_UNIT = 2.0**-16  # of a sketch's numbers, which are integers so that no change of precision rounds them
_TOLERANCE = 8  # units


@dataclass(frozen=True, eq=False)
class Basis:
    """The first k singular vectors and values of a weight, largest first.

    Args:
        outputs: U, `[outputs, k]`.
        inputs: Vᵀ, `[k, inputs]`.
        values: σ, `[k]`.
        sketches: for some numbers of vectors, `sketch` of that many.
    """

    outputs: Tensor
    inputs: Tensor
    values: Tensor
    sketches: dict[int, Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> Basis:
        return self  # nothing writes to it, so that copies of a layer share it

    def to(self, device: torch.device) -> Basis:
        """Return it on a device."""
        return Basis(self.outputs.to(device), self.inputs.to(device), self.values.to(device), self.sketches)

    def apply(self, x: Tensor, change: Tensor) -> Tensor:
        """Return `U diag(change) Vᵀ x`.

        Args:
            x: `[..., inputs]`.
            change: `[n]`, of the first n singular values.
        """
        dtype = torch.promote_types(x.dtype, self.outputs.dtype)
        projected = linear(x.to(dtype), self.inputs[: len(change)].to(dtype))
        return linear((projected * change).to(projected.dtype), self.outputs[:, : len(change)].to(dtype))

    def matrix(self, change: Tensor) -> Tensor:
        """Return `U diag(change) Vᵀ`, `[outputs, inputs]`, in float32 or better; `change` as in `apply`."""
        dtype = torch.promote_types(change.dtype, torch.promote_types(self.outputs.dtype, torch.float32))
        kept = len(change)
        return (self.outputs[:, :kept].to(dtype) * change.to(dtype)) @ self.inputs[:kept].to(dtype)


def base_weight(layer: nn.Module) -> Tensor:
    """Return the weight `[outputs, inputs]` of a bare linear layer, as it is without adapters, merged ones too.

    Raises:
        ValueError: the strategy keeps it elsewhere, so that it is not whole here.
    """
    if is_quantized(layer):
        weight = importlib.import_module("lightning_peft.backbone.quantized_layers").weight_of(layer)
    else:
        held: Any = layer  # `weight` reads with other adapters' deltas in it, and is computed where it is parametrised
        before_merge = getattr(layer._modules.get("weight_deltas"), "_before_merge", {})
        own = before_merge.get("weight", layer._parameters.get("weight"))
        weight = whole((held.weight if own is None else own).detach())
        weight = weight if isinstance(layer, nn.Linear) else weight.T  # Conv1D's is [inputs, outputs]
    inputs, outputs = matrix_shape(layer)
    if weight.shape != (outputs, inputs):
        raise ValueError(
            f"A weight of {outputs} x {inputs} is {tuple(weight.shape)} where its singular vectors are needed: the "
            "strategy keeps it in parts; use DDP, or FSDP with use_orig_params=True."
        )
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise ValueError(f"A weight of {outputs} x {inputs} holds NaN or infinity, so it has no singular vectors.")
    return weight


@torch.no_grad()
def singular_vectors(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U `[outputs, k]`, σ `[k]` and Vᵀ `[k, inputs]` in float64, k the smaller side.

    In float32 vectors of neighbouring singular values would differ from one machine to the next by more than a
    training moves them.
    """
    precise = weight.detach().to("cpu" if weight.device.type == "mps" else weight.device).double()
    return torch.linalg.svd(precise, full_matrices=False)


def decompose(layer: nn.Module, counts: Iterable[int]) -> Basis:
    """Return the singular vectors of a bare linear layer's weight, in its precision; of a quantised one, in float32.

    Args:
        layer: the layer.
        counts: for which numbers of vectors sketches are needed; the largest is how many are kept.
    """
    counts = sorted(set(counts))
    # what is made in inference mode could take part in no training afterwards
    with torch.inference_mode(False), torch.no_grad():
        weight = base_weight(layer)
        outputs, values, inputs = singular_vectors(weight)
        dtype, kept = torch.float32 if is_quantized(layer) else weight.dtype, counts[-1]
        return Basis(
            outputs[:, :kept].to(weight.device, dtype).contiguous(),
            inputs[:kept].to(weight.device, dtype).contiguous(),
            values[:kept].to(weight.device, torch.float32),
            {n: sketch(outputs[:, :n], inputs[:n]) for n in counts},
        )


def sketch(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Return `[8]` integers that another choice of singular vectors would change; signs of pairs do not.

    They are `pᵀ U diag(g) Vᵀ q` for fixed vectors p and q and eight fixed g: what eight adapters would do.

    Args:
        outputs: U, `[outputs, k]`.
        inputs: Vᵀ, `[k, inputs]`.
    """
    if outputs.is_meta:
        return torch.zeros(SKETCH_SIZE, dtype=torch.int32)
    outputs, inputs = outputs.double().cpu(), inputs.double().cpu()
    pairs = (_fixed(len(outputs), 1.0) @ outputs) * (inputs @ _fixed(inputs.shape[1], 2.0))
    changes = torch.stack([_fixed(len(pairs), 3.0 + row) for row in range(SKETCH_SIZE)])
    return (changes @ pairs / _UNIT).round().to(torch.int32)


def differ(one: Tensor, other: Tensor) -> bool:
    """Return whether two sketches are of different vectors."""
    return bool((one.cpu().long() - other.cpu().long()).abs().max() > _TOLERANCE)


def _fixed(size: int, number: float) -> Tensor:
    """Return `[size]` numbers in [-1, 1] without order, the same everywhere."""
    return torch.cos(number + (1.0 + number / 8) * torch.arange(1, size + 1, dtype=torch.float64) ** 2)
