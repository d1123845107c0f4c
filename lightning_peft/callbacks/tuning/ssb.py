"""SSB as one callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from torch import nn

from lightning_peft.backbone import counts
from lightning_peft.backbone.linear_layers import linear_layers
from lightning_peft.backbone.targets import Layers, Within, choose_targets
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.configs import PeftConfig


class SSB(AdapterCallback):
    """Scale each weight from both sides by learned vectors: `y = u ⊙ W (v ⊙ x) + b`, u and v ones at the start.

    Si, Yang and Shen 2024, arXiv:2407.05417. Trainable parameters: `inputs + outputs` for each adapted matrix.

    Args:
        target_modules: names of the modules to adapt (or suffixes; a string is a regular expression). Default: every
            linear layer of the backbone's blocks, or of the backbone where it has no blocks.
        layers: which blocks to adapt: numbers (0-based), or a rule such as `Layers(last=4)`; default all.
        within: adapt only modules in `"attention"`, or only those in the `"mlp"`.
        **options: see `AdapterOptions`.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import SSB
        >>> trainer = L.Trainer(callbacks=[SSB()], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    default_name = "ssb"

    sides = "both"

    def __init__(
        self,
        target_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        within: Within | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        super().__init__(**options)
        self.target_modules, self.layers, self.within = target_modules, layers, within

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.ssb import SSBConfig

        targets = linear_layers(backbone) if self.target_modules is None else self.target_modules
        return SSBConfig(target_modules=choose_targets(backbone, targets, self.layers, self.within), sides=self.sides)

    def trainable_parameters(self, backbone: nn.Module) -> int:
        sides = (self.sides != "output", self.sides != "input")
        return sum(sides[0] * inputs + sides[1] * outputs for inputs, outputs in counts.linear(backbone))
