"""QLoRA as one callback."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Unpack

import lightning as L
from torch import nn

from lightning_peft.backbone.defaults import every_matrix, unambiguous
from lightning_peft.backbone.targets import Layers, Within
from lightning_peft.callbacks.quantize import Quantize, check_strategy
from lightning_peft.callbacks.tuning.lora import LoRA
from lightning_peft.fitting.adapter_callback import AdapterOptions
from lightning_peft.fitting.law_example import LawExample
from lightning_peft.fitting.paging import PAGED, PagedOptimizer, page_optimizers
from lightning_peft.stack.adapter import Adapter

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.configs import PeftConfig


class QLoRA(LoRA):
    """LoRA on a base that is kept in 4 bits: `y = dequantise(W) x + (alpha / r) B A x`, W in NF4.

    Dettmers et al. 2023, arXiv:2305.14314; the defaults are theirs for models up to 13B parameters. Trainable
    parameters: `r * (inputs + outputs)` for each adapted matrix.

    Args:
        r: the rank.
        alpha: the scaling is `alpha / r`.
        dropout: dropout on the input of A, in training; the paper has 0.05 for 33B and 65B parameters.
        target_modules: names of the modules to adapt (or suffixes; a string is a regular expression). Default: every
            linear layer but the output embedding.
        layers: which blocks to adapt, see `LoRA`.
        within: adapt only modules in `"attention"`, or only those in the `"mlp"`.
        variant: `"lora"`, `"rslora"` or `"dora"`, see `LoRA`.
        quant_type: see `Quantize`.
        double_quant: see `Quantize`.
        compute_dtype: see `Quantize`; the paper's is `"bfloat16"`.
        skip_modules: see `Quantize`.
        paged_optimizer: `"paged_adamw_32bit"` (the paper's) or `"paged_adamw_8bit"` takes the place of the module's
            AdamW, with its groups and hyper-parameters; default, the module's own stays.
        **options: see `AdapterOptions`.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import QLoRA
        >>> trainer = L.Trainer(callbacks=[QLoRA(r=16, paged_optimizer="paged_adamw_8bit")], accelerator="cpu",
        ...                     logger=False, enable_checkpointing=False)
    """

    default_name = "qlora"

    exempt: Mapping[str, str] = {"merge": "what is written into quantised weights is rounded again"}
    law_examples: Mapping[str, LawExample] = {"QLoRA": LawExample({"r": 2, "alpha": 4, "dropout": 0.0}, four_bits=True)}

    def __init__(
        self,
        r: int = 64,
        alpha: float = 16,
        dropout: float = 0.1,
        target_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        within: Within | None = None,
        variant: Literal["lora", "rslora", "dora"] = "lora",
        quant_type: Literal["nf4", "fp4", "int8"] = "nf4",
        double_quant: bool = True,
        compute_dtype: str | None = None,
        skip_modules: Sequence[str] | None = None,
        paged_optimizer: PagedOptimizer | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if paged_optimizer is not None and paged_optimizer not in PAGED:
            raise ValueError(f"paged_optimizer must be one of {', '.join(PAGED)}, got {paged_optimizer!r}.")
        super().__init__(
            r=r,
            alpha=alpha,
            dropout=dropout,
            target_modules=target_modules,
            layers=layers,
            within=within,
            variant=variant,
            **options,
        )
        self.paged_optimizer = paged_optimizer
        self.quantization = Quantize(quant_type, double_quant, compute_dtype, skip_modules=skip_modules)

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        if self.target_modules is not None or self.within is not None:
            return super().make_config(backbone)
        return self._everywhere(backbone).make_config(backbone)

    def trainable_parameters(self, backbone: nn.Module) -> int:
        if self.target_modules is not None or self.within is not None:
            return super().trainable_parameters(backbone)
        return self._everywhere(backbone).trainable_parameters(backbone)

    def _everywhere(self, backbone: nn.Module) -> QLoRA:
        everywhere = copy.copy(self)
        everywhere.target_modules = unambiguous(backbone, every_matrix(backbone))
        return everywhere

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_strategy(trainer)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.paged_optimizer is not None:
            page_optimizers(trainer, self.paged_optimizer)

    def _inject(self, module: nn.Module, backbone_name: str) -> list[Adapter]:
        self.quantization.quantize(module, backbone_name)
        return super()._inject(module, backbone_name)
