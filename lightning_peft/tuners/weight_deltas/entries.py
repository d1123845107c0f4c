"""Deltas of which chosen entries are stored, one after another: choose the small ones, and reach them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_peft.backbone.modules import standalone_name
from lightning_peft.backbone.sharded import whole
from lightning_peft.tuners.weight_deltas.config import WeightDeltasConfig, pack, sparsely_packed, unpack
from lightning_peft.tuners.weight_deltas.layer import WeightDeltasLayer
from lightning_peft.tuners.weight_deltas.masks import keep_largest
from lightning_peft.tuners.weight_deltas.owners import places


@dataclass(frozen=True, eq=False)
class Entries:
    """The chosen entries of one parameter.

    Args:
        full_name: of the parameter, as the model without adapters calls it.
        value: their deltas, `[count]`.
        trained: which of them are trained, `[count]`.
        fixed: the deltas of the others, `[count]`.
        positions: where they stand in the flat parameter, `[count]`.
        base: the frozen parameter.
    """

    full_name: str
    value: nn.Parameter
    trained: Tensor
    fixed: Tensor
    positions: Tensor
    base: nn.Parameter

    @torch.no_grad()
    def current(self) -> Tensor:
        """Return what the entries of the parameter are now, in the delta's precision, `[count]`."""
        delta = torch.where(self.trained, whole(self.value), self.fixed)
        return whole(self.base).reshape(-1)[self.positions].to(delta.dtype) + delta


def entries(backbone: nn.Module, adapter: str) -> list[Entries]:
    """Return the chosen entries of an adapter's parameters, of those stored so that some can come to rest, in order."""
    every = []
    for name, layer in backbone.named_modules():
        if isinstance(layer, WeightDeltasLayer):
            owner = standalone_name(backbone, name).removesuffix("weight_deltas")
            fixed, masks, values = (layer._by_parameter(c, adapter) for c in (layer.fixed, layer.masks, layer.values))
            for key in fixed.keys() if fixed else ():
                base = layer._owner[0]._parameters[key]
                assert base is not None
                positions = _positions(layer, adapter, key, base.numel())
                every.append(Entries(owner + key, values[key], masks[key], fixed[key], positions, base))
    return every


def place(backbone: nn.Module, adapter: str, masks: dict[str, Tensor]) -> None:
    """Let a fresh adapter's entries be the true ones of these masks, one a parameter, by full name."""
    for name, layer in backbone.named_modules():
        if isinstance(layer, WeightDeltasLayer):
            owner = standalone_name(backbone, name).removesuffix("weight_deltas")
            for container, form in ((layer.indices, _indices), (layer.bits, pack)):
                for key, stored in layer._by_parameter(container, adapter).items() if adapter in container else ():
                    stored.copy_(form(masks[owner + key].reshape(-1)))


def choose_small(
    backbone: nn.Module, names: Sequence[str], threshold: float | None, density: float | None
) -> tuple[dict[str, Tensor], float]:
    """Choose the entries of small magnitude among parameters; one that is exactly 0 is never chosen.

    Args:
        backbone: the model; its own values are meant, without adapters.
        names: full names of parameters.
        threshold: choose what is smaller.
        density: choose this share of all entries that are not 0 instead, the first ones where some tie.

    Returns:
        A mask for each parameter of which something is chosen, by name; and the magnitude that all chosen are below.

    Raises:
        ValueError: a parameter is quantised or has no values yet, or nothing is chosen.
    """
    known = {where[0].full_name: where[0].parameter for where in places(backbone)}
    magnitudes: dict[str, Tensor] = {}
    for name in names:
        parameter = known[name]
        assert parameter is not None
        if parameter.is_meta:
            raise ValueError(f"Entries are chosen by size, and {name} has no values yet: load the weights first.")
        if not parameter.is_floating_point():
            raise ValueError(f"Entries are chosen by size, and {name} is quantised: take an unquantised base.")
        magnitudes[name] = whole(parameter.detach()).abs().float()
    if density is None:
        assert threshold is not None
        masks = [(size > 0) & (size < threshold) for size in magnitudes.values()]
        cut = threshold
    else:
        among = [size > 0 for size in magnitudes.values()]
        count = int(density * sum(int(mask.sum()) for mask in among))
        masks = keep_largest([-size for size in magnitudes.values()], among, count)
        sizes = [size[mask].max() for size, mask in zip(magnitudes.values(), masks, strict=True) if mask.any()]
        cut = float(torch.nextafter(torch.stack(sizes).max().cpu(), torch.tensor(torch.inf))) if sizes else 0.0
    chosen = {name: mask for name, mask in zip(magnitudes, masks, strict=True) if mask.any()}
    if not chosen:
        size = f"below {threshold}" if density is None else f"in a share of {density}"
        raise ValueError(f"No entry of the {len(names)} chosen parameters is {size} and not 0: raise it.")
    return chosen, cut


def entries_config(masks: dict[str, Tensor]) -> WeightDeltasConfig:
    """Return the configuration of an adapter that trains the true entries of these masks, by full name."""
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    packed = [name for name, mask in masks.items() if not sparsely_packed(kept[name], mask.numel())]
    return WeightDeltasConfig(target_parameters=list(masks), masked=list(masks), kept=kept, packed=packed or None)


def _indices(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0].int()


def _positions(layer: WeightDeltasLayer, adapter: str, key: str, size: int) -> Tensor:
    bits = layer._by_parameter(layer.bits, adapter)
    if key in bits:
        return unpack(bits[key], size).nonzero()[:, 0]
    return layer._by_parameter(layer.indices, adapter)[key].long()
