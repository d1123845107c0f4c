"""The configuration of a weight-masks adapter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

from peft.config import PeftConfig
from torch import Tensor

from lightning_peft.stack.registration import add_peft_type
from lightning_peft.tuners.config import WithCard
from lightning_peft.tuners.targets import order_targets
from lightning_peft.tuners.weight_deltas.bits import pack
from lightning_peft.tuners.weight_masks.largest import largest

CRITERIA = ("movement", "magnitude", "random")
_SCORES, _KEPT, _BITS = (f".weight_mask_{kind}" for kind in ("scores", "kept", "bits"))


@dataclass
class WeightMasksConfig(WithCard, PeftConfig):
    """A mask for each of some linear layers: `W' = W ∘ M(S)`, the weights W frozen and the scores S trained.

    M keeps the entries of the highest scores, of each matrix the same share, and where scores tie the first ones in the
    order of `W [outputs, inputs]`. Its gradient is straight-through, `∂L/∂S = ∂L/∂W' ∘ W` (Sanh, Wolf and Rush 2020,
    arXiv:2005.07683), and W stays as it is (Mallya, Davis and Lazebnik 2018, arXiv:1801.06519). Trained parameters:
    `inputs * outputs` for each layer. A folder written by `save_adapter` holds one bit for each.

    Args:
        target_modules: the linear layers, by name or suffix; a string is a regular expression, or `"all-linear"`.
            Default: those of the model's blocks.
        density: the share of entries that each mask keeps, in (0, 1]; at 1 the adapter changes nothing. Training may
            lower it, see `WeightMasksLayer.keep_at_most`; a folder notes what share its bits keep.
        criterion: what the scores are: 0 at first and trained, `"movement"`; `|W|`, `"magnitude"`, or drawn at
            `"random"`, both of which training leaves as they are.
        seed: of the random scores.
        alpha: the dial: `W ∘ (1 - alpha (1 - M))` acts.
        packed: the masks are given by a bit for each entry in place of scores, and are not trained.
        exclude_modules: names left out of `target_modules`.
        modules_to_save: other modules to train and save whole, as in every peft method.
        layers_to_transform: the numbers of the blocks in which `target_modules`, given by suffixes, are adapted.
        layers_pattern: the name of the list of blocks, where it is not the first in a module's name.
    """

    target_modules: list[str] | str | None = field(default=None)
    density: float = field(default=1.0)
    criterion: str = field(default="movement")
    seed: int = field(default=0)
    alpha: float = field(default=1.0)
    packed: bool = field(default=False)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("WEIGHT_MASKS")
        order_targets(self)
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must be in (0, 1], got {self.density}.")
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {self.criterion!r}.")

    def compacted(self, tensors: Mapping[str, Tensor]) -> tuple[WeightMasksConfig, dict[str, Tensor]]:
        """Return this adapter as it is written to a folder: of each score the bit whether its entry is kept.

        Args:
            tensors: under the keys of a saved peft folder.

        Returns:
            The configuration and the tensors of an adapter that computes the same, bit for bit, and cannot be trained.
        """
        compact, kept, entries = dict(tensors), 0, 0
        for key in [key for key in tensors if key.endswith(_SCORES)]:
            layer = key.removesuffix(_SCORES)
            mask, _ = largest(compact.pop(key), int(compact.pop(layer + _KEPT)))
            compact[layer + _BITS] = pack(mask.reshape(-1))
            kept, entries = kept + int(mask.sum()), entries + mask.numel()
        config = copy.deepcopy(self)
        config.packed = True
        config.density = kept / entries if kept else self.density
        return config, compact
