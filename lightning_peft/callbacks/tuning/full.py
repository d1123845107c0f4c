"""Full fine-tuning, of everything or of the top layers, as callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

from torch import nn

from lightning_peft.backbone import counts
from lightning_peft.backbone.targets import Layers, Within
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.configs import PeftConfig


class FullFineTuning(AdapterCallback):
    """Train the backbone's own parameters, as differences from where they started: `W = W0 + delta`.

    The gradient of `delta` is that of `W`, so without weight decay the training is that of `W` itself; with weight
    decay the weights are pulled to `W0` and not to zero. The difference is a task vector (Ilharco et al. 2023,
    arXiv:2212.04089): it can be scaled, switched off, added to others and merged. Trainable parameters: all of those
    chosen; shared ones count once.

    Args:
        layers: which blocks: numbers (0-based), or a rule such as `Layers(last=4)`; default everything in the backbone.
        within: train only the matrices of the blocks' `"attention"`, or only of their `"mlp"`.
        backbone_dropout: see `AdapterOptions`; plain fine-tuning of a model with dropout keeps it.
        **options: see `AdapterOptions`.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import FullFineTuning
        >>> trainer = L.Trainer(callbacks=[FullFineTuning()], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "full"

    def __init__(
        self,
        layers: Layers | list[int] | None = None,
        within: Within | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        super().__init__(**options)
        self.layers, self.within = layers, within

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.weight_deltas import WeightDeltasConfig
        from lightning_peft.tuners.weight_deltas.choice import choose_parameters

        return WeightDeltasConfig(target_parameters=choose_parameters(backbone, self.layers, self.within))

    def trainable_parameters(self, backbone: nn.Module) -> int:
        return counts.everything(backbone)


class TopLayers(AdapterCallback):
    """Train the last k blocks and what stands after them, as differences; everything below stays as it is.

    Trainable parameters: all of those. Backward ends at the lowest of the blocks.

    Args:
        k: how many blocks, from the last one down; of an encoder and a decoder both.
        final_norm: also train the normalisation after the last block.
        head: also train what else comes after it inside the backbone, such as an output embedding that is not tied.
        **options: see `AdapterOptions`.

    Example:
        >>> from lightning_peft.callbacks import TopLayers
        >>> TopLayers(2).names
        ('top',)
    """

    default_name = "top"
    law_examples: Mapping[str, LawExample] = {"TopLayers": LawExample({"k": 1, "head": False, "final_norm": False})}

    def __init__(
        self,
        k: int = 2,
        final_norm: bool = True,
        head: bool = True,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if k < 1:
            raise ValueError(f"TopLayers trains at least one block, got k={k}.")
        super().__init__(**options)
        self.k, self.final_norm, self.head = k, final_norm, head

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.weight_deltas import WeightDeltasConfig
        from lightning_peft.tuners.weight_deltas.choice import choose_top

        return WeightDeltasConfig(target_parameters=choose_top(backbone, self.k, self.final_norm, self.head))

    def trainable_parameters(self, backbone: nn.Module) -> int | None:
        return None if self.final_norm or self.head or self.k > 1 else counts.last_blocks(backbone)
