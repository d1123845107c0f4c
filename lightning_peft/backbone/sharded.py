"""Tensors that are spread over processes (`DTensor`, what FSDP2 makes of parameters), read and written as a whole."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is a `DTensor`."""
    dtensor: Any = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    return isinstance(tensor, dtensor)


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, on every process; all processes must ask for a sharded one together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor; nothing is sent."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def write(target: Tensor, value: Tensor) -> None:
    """Copy into a tensor, of which each process keeps its own part; `value` is whole and the same everywhere."""
    if is_sharded(target) and not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(target.device)
        # without a source rank nothing is sent: each process takes its part of what it has
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def has_shards(module: nn.Module) -> bool:
    """Return whether some parameter of a module is spread over processes, by FSDP2, tensor parallelism or FSDP1."""
    fsdp: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    return any(is_sharded(p) for p in module.parameters()) or any(isinstance(m, fsdp) for m in module.modules())
