"""BitFit as one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Unpack

from torch import nn

from lightning_peft.backbone import counts
from lightning_peft.backbone.targets import Layers, Within
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.configs import PeftConfig


class BitFit(AdapterCallback):
    """Train the biases and nothing else: `y = W x + b0 + delta`.

    Ben Zaken et al. 2022, arXiv:2106.10199. Trainable parameters: one for each output of each module with a bias.

    Args:
        parts: `"all"` biases, those of norms too, or those of `"query_and_second_mlp"`, which the paper found to matter
            most.
        add_missing: linear layers and convolutions without a bias, all but the output embedding, are given a zero one.
            LLaMA-likes and T5 have none.
        layers: which blocks: numbers (0-based), or a rule such as `Layers(last=4)`; default everything in the backbone.
        within: train only biases of matrices in the blocks' `"attention"`, or only in their `"mlp"`.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: at `setup`, besides what `PEFT` raises: the backbone has no such biases.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import BitFit
        >>> trainer = L.Trainer(callbacks=[BitFit(add_missing=True)], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "bitfit"
    law_examples: Mapping[str, LawExample] = {"BitFit": LawExample({"add_missing": True})}

    def __init__(
        self,
        parts: Literal["all", "query_and_second_mlp"] = "all",
        add_missing: bool = False,
        layers: Layers | list[int] | None = None,
        within: Within | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if parts not in ("all", "query_and_second_mlp"):
            raise ValueError(f'parts must be "all" or "query_and_second_mlp", got {parts!r}.')
        super().__init__(**options)
        self.parts: Literal["all", "query_and_second_mlp"] = parts
        self.add_missing, self.layers, self.within = add_missing, layers, within

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.weight_deltas import WeightDeltasConfig
        from lightning_peft.tuners.weight_deltas.choice import choose_biases

        biases = choose_biases(backbone, self.parts, self.add_missing, self.layers, self.within)
        return WeightDeltasConfig(target_parameters=biases, add_missing=self.add_missing)

    def trainable_parameters(self, backbone: nn.Module) -> int | None:
        return counts.biases(backbone) if self.add_missing and self.parts == "all" else None
