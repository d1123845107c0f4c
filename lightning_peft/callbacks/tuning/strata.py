"""A method for each depth of the backbone (SPAFIT by default), as one callback."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn

from lightning_peft.backbone import counts
from lightning_peft.backbone.language_model import part_blocks
from lightning_peft.backbone.structure import matrix_shape
from lightning_peft.callbacks.tuning.bitfit import BitFit
from lightning_peft.callbacks.tuning.composite import Composite
from lightning_peft.callbacks.tuning.lora import LoRA
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.configs import PeftConfig


class Strata(Composite):
    """Divide the blocks by depth and train each stratum by methods of its own, or not at all.

    The default is SPAFIT (Arora & Wang 2024, arXiv:2405.00201): the first stratum stays frozen, the second trains its
    biases, the third LoRA on the attention and the biases of everything else. What stands outside the blocks is frozen.

    Args:
        boundaries: the numbers of the blocks with which the second, third, … stratum begin, not falling;
            `(8, 16)` makes strata of blocks 0 to 7, 8 to 15, and 16 to the last. Default: thirds.
        methods: for each stratum, the callbacks that say what is trained there, innermost first; an empty list freezes
            it. Each must have an argument `layers`, which is set here. Where one adapts a module by another method,
            biases trained beside it leave that module out. Default: SPAFIT's.
        r: the rank of SPAFIT's LoRA.
        alpha: its scaling is `alpha / r`.
        add_missing: SPAFIT's biases are created where there are none; LLaMA-likes and T5 have none.
        name: the beginning of the adapters' names; the stratum's number and the method's name follow.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: at once for wrong arguments; at `setup` where the backbone has fewer blocks.

    Example:
        >>> from lightning_peft.callbacks import Strata
        >>> Strata(boundaries=(8, 16)).names
        ('strata-2-bitfit', 'strata-3-lora', 'strata-3-bitfit')
    """

    default_name = "strata"
    law_examples: Mapping[str, LawExample] = {
        "Strata": LawExample({"boundaries": (1, 2), "r": 2, "add_missing": True}, ("attention", "mlp"))
    }

    def __init__(
        self,
        boundaries: tuple[int, ...] | list[int] | None = None,
        methods: list[list[AdapterCallback]] | None = None,
        r: int = 8,
        alpha: float = 16,
        add_missing: bool = False,
        **options: Unpack[AdapterOptions],
    ) -> None:
        self.rank = r if methods is None and add_missing else None  # where there is a formula
        if methods is None:
            biases = BitFit(add_missing=add_missing)
            methods = [[], [biases], [LoRA(r=r, alpha=alpha, within="attention"), biases]]
        if boundaries is not None and (sorted(boundaries) != list(boundaries) or min(boundaries, default=0) < 0):
            raise ValueError(f"boundaries must not fall or be negative, got {list(boundaries)}.")
        if boundaries is not None and len(boundaries) + 1 != len(methods):
            raise ValueError(
                f"{len(boundaries)} boundaries make {len(boundaries) + 1} strata, but {len(methods)} have methods."
            )
        if unlayered := [type(m).__name__ for stratum in methods for m in stratum if not hasattr(m, "layers")]:
            raise ValueError(f"{unlayered[0]} cannot be restricted to layers, and so not to a stratum.")
        named = {f"{number}-{method.name}": method for number, stratum in enumerate(methods, 1) for method in stratum}
        if len(named) < sum(map(len, methods)):
            raise ValueError("Two methods of one stratum have the same name: give one of them another.")
        super().__init__(named, **options)
        self.boundaries = None if boundaries is None else tuple(boundaries)
        self.count = len(methods)

    def make_configs(self, backbone: nn.Module) -> dict[str, PeftConfig]:
        strata = self._strata(backbone)
        configs: dict[str, PeftConfig] = {}
        adapted: dict[int, list[str]] = {}  # modules that a stratum adapts otherwise than by their own parameters
        for key, name in zip(self.methods, self.names, strict=True):
            restricted: Any = copy.copy(self.methods[key])
            restricted.layers = strata[_stratum(key)]
            configs[name] = restricted.make_config(backbone)
            adapted.setdefault(_stratum(key), []).extend(getattr(configs[name], "target_modules", None) or ())
        for key, name in zip(self.methods, self.names, strict=True):
            config: Any = configs[name]
            if isinstance(parameters := getattr(config, "target_parameters", None), list):
                modules = set(adapted[_stratum(key)])
                config.target_parameters = [p for p in parameters if p.rpartition(".")[0] not in modules]
                if not config.target_parameters:
                    raise ValueError(
                        f"{type(self.methods[key]).__name__} has nothing left to train in blocks "
                        f"{strata[_stratum(key)]}: the other methods of that stratum adapt all the modules whose "
                        "parameters it would train, so leave it out there."
                    )
        return configs

    def trainable_parameters(self, backbone: nn.Module) -> int | None:
        """Return the biases of the second stratum, and of the third those that LoRA on the attention leaves."""
        if self.rank is None:
            return None
        (_, trained, adapted), count = self._strata(backbone), 0
        for block in part_blocks(backbone):
            count += counts.biases(block.module) if block.number in {*trained, *adapted} else 0
            names = [name for span in block.attention for name in span.matrices] if block.number in adapted else []
            for inputs, outputs in (matrix_shape(backbone.get_submodule(name)) for name in names):
                count += self.rank * (inputs + outputs) - outputs
        return count

    def _strata(self, backbone: nn.Module) -> list[list[int]]:
        """Return the numbers of each stratum's blocks."""
        count = max((block.number + 1 for block in part_blocks(backbone)), default=0)
        bounds = self.boundaries or tuple(count * i // self.count for i in range(1, self.count))
        strata = [list(range(a, b)) for a, b in itertools.pairwise((0, *bounds, count))]
        if any(not strata[_stratum(key)] for key in self.methods):
            raise ValueError(
                f"{type(backbone).__name__} has {count} blocks, too few for strata that begin with {list(bounds)}."
            )
        return strata


def _stratum(key: str) -> int:
    """Return the number, from 0, of the stratum that a method belongs to."""
    return int(key.partition("-")[0]) - 1
