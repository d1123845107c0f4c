"""Singular-value tuning as one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

from torch import nn

from lightning_peft.backbone import counts
from lightning_peft.backbone.linear_layers import linear_layers
from lightning_peft.backbone.targets import Layers, Within, choose_targets
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.configs import PeftConfig


class SingularValues(AdapterCallback):
    """Train the singular values of each weight: `W = U diag(σ) Vᵀ` becomes `U diag(σ + δ) Vᵀ`, δ zero at the start.

    Han et al. 2023, arXiv:2303.11305 (SVDiff), and Peng et al. 2024, arXiv:2308.14604 (SAM-PARSER). It is computed
    as `W x + U (δ ∘ (Vᵀ x))`, so that the untrained model is the base bit for bit. Trainable parameters:
    `min(inputs, outputs, top)` for each adapted matrix. U and V take `min(inputs, outputs, top) * (inputs + outputs)`
    numbers of each in memory, in the precision of the weight, and are saved nowhere.

    Args:
        top: train only this many of the largest singular values of each weight; default all.
        nonnegative: let `relu(σ + δ)` act, as the authors do: no singular value turns negative.
        target_modules: names of the modules to adapt (or suffixes; a string is a regular expression). Default: every
            linear layer of the backbone's blocks, or of the backbone where it has no blocks.
        layers: which blocks to adapt: numbers (0-based), or a rule such as `Layers(last=4)`; default all.
        within: adapt only modules in `"attention"`, or only those in the `"mlp"`.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: at once for a `top` below 1; in the first call, where a loaded adapter was trained with other
            singular vectors than this base has.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import SingularValues
        >>> trainer = L.Trainer(callbacks=[SingularValues(top=64)], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "singular_values"
    law_examples: Mapping[str, LawExample] = {
        "SingularValues": LawExample(),
        "SingularValues, the largest, relu": LawExample({"top": 3, "nonnegative": True}),
    }

    def __init__(
        self,
        top: int | None = None,
        nonnegative: bool = False,
        target_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        within: Within | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if top is not None and top < 1:
            raise ValueError(f"top must be at least 1, or None for all singular values, got {top}.")
        super().__init__(**options)
        self.top, self.nonnegative = top, nonnegative
        self.target_modules, self.layers, self.within = target_modules, layers, within

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.singular_values import SingularValuesConfig

        targets = linear_layers(backbone) if self.target_modules is None else self.target_modules
        modules = choose_targets(backbone, targets, self.layers, self.within)
        return SingularValuesConfig(target_modules=modules, top=self.top, nonnegative=self.nonnegative)

    def trainable_parameters(self, backbone: nn.Module) -> int:
        sizes = (min(shape) for shape in counts.linear(backbone))
        return sum(size if self.top is None else min(size, self.top) for size in sizes)
