"""Reach an adapter's masked deltas, and choose masks of an exact size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_peft.backbone.modules import standalone_name
from lightning_peft.tuners.weight_deltas.layer import WeightDeltasLayer


@dataclass(frozen=True, eq=False)
class Delta:
    """One parameter's delta.

    Args:
        full_name: of the parameter, as the model without adapters calls it.
        value: the delta, in the parameter's shape.
        mask: where it acts; None where it always does.
        base: the frozen parameter; 0 for a bias that is not there.
    """

    full_name: str
    value: nn.Parameter
    mask: Tensor | None
    base: Tensor


def deltas(backbone: nn.Module, adapter: str) -> list[Delta]:
    """Return the deltas of an adapter whose every target exists and is stored densely, in order."""
    dense = []
    for name, layer in backbone.named_modules():
        if isinstance(layer, WeightDeltasLayer):
            masks = layer._by_parameter(layer.masks, adapter)
            owner = standalone_name(backbone, name).removesuffix("weight_deltas")
            for key, value in layer._by_parameter(layer.values, adapter).items():
                base = layer._owner[0]._parameters[key]
                mask = masks[key] if key in masks else None  # noqa: SIM401 - it may be a module, which has no `get`
                dense.append(Delta(owner + key, value, mask, value.detach().new_zeros(()) if base is None else base))
    return dense


def keep_largest(scores: Sequence[Tensor], among: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return masks of exactly `count` true entries in all: the largest scores, the first ones where they tie.

    Args:
        scores: one tensor a parameter, any shapes.
        among: of the same shapes, where an entry may be chosen.
        count: how many to choose, from 0 to the number of candidates.

    Raises:
        ValueError: a score is not finite, or there are fewer candidates.

    Example:
        >>> keep_largest([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])], [torch.ones(2).bool()] * 2, 2)
        [tensor([ True, False]), tensor([ True, False])]
    """
    precise = max((torch.promote_types(score.dtype, torch.float32) for score in scores), key=lambda d: d.itemsize)
    candidates = torch.cat([score[allowed].to(precise) for score, allowed in zip(scores, among, strict=True)])
    if not torch.isfinite(candidates).all():
        raise ValueError("No mask can be chosen: a trained weight is NaN or infinite.")
    if not 0 <= count <= len(candidates):
        raise ValueError(f"{count} entries cannot be chosen among {len(candidates)}.")
    taken = torch.zeros_like(candidates, dtype=torch.bool)
    if count:
        threshold = candidates.kthvalue(len(candidates) - count + 1).values
        taken = candidates > threshold
        ties = (candidates == threshold).nonzero()[:, 0]
        taken[ties[: count - int(taken.sum())]] = True
    masks, start = [], 0
    for allowed in among:
        mask = torch.zeros_like(allowed)
        end = start + int(allowed.sum())
        mask[allowed] = taken[start:end]
        masks.append(mask)
        start = end
    return masks
