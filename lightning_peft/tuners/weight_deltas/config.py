"""The configuration of a weight-deltas adapter."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from peft.config import PeftConfig
from torch import Tensor

from lightning_peft.stack.registration import add_peft_type
from lightning_peft.tuners.config import WithCard
from lightning_peft.tuners.targets import ordered
from lightning_peft.tuners.weight_deltas.bits import pack, unpack
from lightning_peft.tuners.weight_deltas.hard_concrete import settled

_VALUES, _MASKS, _INDICES, _BITS, _FIXED, _GATES, _TENSOR_GATES, _GATE_RATES = (
    f".weight_deltas.{kind}."
    for kind in ("values", "masks", "indices", "bits", "fixed", "gates", "tensor_gates", "gate_rates")
)

__all__ = ["WeightDeltasConfig", "pack", "sparsely_packed", "storage", "unpack"]


@dataclass
class WeightDeltasConfig(WithCard, PeftConfig):
    """A difference for each of some parameters: with `theta0` frozen, the model computes with `theta0 + alpha * delta`.

    `delta` is zero at the start. Its strength is the dial of task vectors (Ilharco et al. 2023, arXiv:2212.04089), and
    weight decay on it pulls towards the pretrained weights.

    Args:
        target_parameters: full names of parameters in the model without adapters, or a regular expression for whole
            names. A parameter that several modules share has one delta.
        add_missing: also accept `<module>.bias` where the module could have a bias and has none; it is zero at first.
        alpha: the strength, multiplied onto every delta.
        masked: those of the target parameters that have a mask beside their delta, one truth value an entry, all true
            at first; where it is false the entry keeps its value of `theta0`.
        pruned: where a mask is false the entry is 0 instead.
        kept: for parameters of which some entries are stored, as in a saved sparse adapter: how many each has.
            One of them that is also `masked` has a mask of its stored entries, and where that is false an entry keeps
            the delta that it had.
        packed: those of them whose entries are given by a bit for each; the others by indices.
        gates: multiply each entry of the deltas that are stored whole by a hard-concrete gate of this logit at the
            start, at least log(5), so that all are open; None for no gates.
        tensor_gates: multiply each of these deltas by one gate more.
        target_modules: not used; peft asks for it.
        exclude_modules: not used; peft asks for it.
        modules_to_save: other modules to train and save whole, as in every peft method.
    """

    target_parameters: list[str] | str | None = field(default=None)
    add_missing: bool = field(default=False)
    alpha: float = field(default=1.0)
    masked: list[str] | None = field(default=None)
    pruned: bool = field(default=False)
    kept: dict[str, int] | None = field(default=None)
    packed: list[str] | None = field(default=None)
    gates: float | None = field(default=None)
    tensor_gates: bool = field(default=False)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("WEIGHT_DELTAS")
        if self.target_parameters is not None:
            self.target_parameters = ordered(self.target_parameters)
        if self.target_modules is not None:
            raise ValueError("WeightDeltasConfig takes target_parameters, the full names of parameters, not modules.")
        if self.gates is not None and self.gates < math.log(5):
            raise ValueError(f"gates must be at least log(5) = 1.61, so that all are open at first, got {self.gates}.")

    def compacted(self, tensors: Mapping[str, Tensor]) -> tuple[WeightDeltasConfig, dict[str, Tensor]]:
        """Return this adapter as it is written to a folder: of masked deltas only the entries that the mask lets act.

        Gates are multiplied into their deltas, as evaluation has them.

        Args:
            tensors: under the keys of a saved peft folder.

        Returns:
            The configuration and the tensors of an adapter that computes the same, bit for bit.
        """
        tensors = self._settled(tensors)
        counts, packed, compact, bare = dict(self.kept or {}), list(self.packed or ()), dict(tensors), set()
        for key in [key for key in tensors if _MASKS in key]:
            mask, value = compact.pop(key).reshape(-1), key.replace(_MASKS, _VALUES)
            name = key.removeprefix("base_model.model.").replace(_MASKS.removeprefix("."), "")
            count, entries = int(mask.sum()), mask.numel()
            if count == entries:
                bare.add(name)
                continue
            compact[value] = tensors[value].reshape(-1)[mask]
            counts[name] = count
            if sparsely_packed(count, entries):
                compact[key.replace(_MASKS, _INDICES)] = mask.nonzero()[:, 0].int()
            else:
                compact[key.replace(_MASKS, _BITS)] = pack(mask)
                packed.append(name)
        config = copy.deepcopy(self)
        config.kept, config.packed = counts or None, packed or None
        config.masked = [name for name in self.masked or () if name not in counts and name not in bare] or None
        config.gates, config.tensor_gates = None, False
        return config, compact

    def _settled(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors with gates multiplied into deltas, and stored entries that rest in their place."""
        plain = dict(tensors)
        for key in [key for key in tensors if _GATES in key]:
            assert self.gates is not None
            rate = plain.pop(key.replace(_GATES, _GATE_RATES))
            trained = [plain.pop(key), plain.pop(key.replace(_GATES, _TENSOR_GATES), None)]
            value = key.replace(_GATES, _VALUES)
            for logits in (self.gates + rate * part for part in trained if part is not None):
                plain[value] = settled(logits) * plain[value]
        for key in [key for key in tensors if _FIXED in key]:
            mask, value = plain.pop(key.replace(_FIXED, _MASKS)), key.replace(_FIXED, _VALUES)
            plain[value] = torch.where(mask, plain[value], plain.pop(key))
        return plain


def sparsely_packed(count: int, entries: int) -> bool:
    """Return whether indices of four bytes take less than a bit for each entry."""
    return 32 * count < entries < 2**31


def storage(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of a delta for a parameter of this precision: float32 where that is less."""
    return torch.promote_types(dtype, torch.float32)
