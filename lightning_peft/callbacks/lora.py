"""LoRA as one callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import nn

from lightning_peft.callbacks.peft import PEFT
from lightning_peft.tuners.targets import Layers, Within, choose_targets

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.tuners.configs import PeftConfig


class LoRA(PEFT):
    """Low-rank adaptation: `y = W x + (alpha / r) B A x`, with W frozen and B zero at the start.

    Hu et al. 2021, arXiv:2106.09685. Trainable parameters: `r * (inputs + outputs)` for each adapted matrix.

    Args:
        r: the rank.
        alpha: the scaling is `alpha / r`.
        dropout: dropout on the input of A, in training.
        target_modules: names of the modules to adapt (or suffixes; a string is a regular expression). Default: peft's
            choice for the model's type, else every linear layer of the backbone.
        layers: which blocks to adapt: numbers (0-based), or a rule such as `Layers(last=4)`; default all. Needs the
            backbone's blocks in a numbered list; each block that is named must exist.
        within: adapt only modules in `"attention"`, or only those in the `"mlp"`.
        variant: `"lora"`, `"rslora"` (scaling `alpha / sqrt(r)`) or `"dora"` (magnitude and direction apart).
        init: peft's `init_lora_weights`: True (the paper's), `"gaussian"`, `"orthogonal"`, `"pissa"`, …
        bias: `"none"`, `"all"` or `"lora_only"`: which biases are trained too.
        backbone: see `PEFT`.
        name: the adapter's name.
        backbone_dropout: see `PEFT`.
        gradient_checkpointing: see `PEFT`.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import LoRA
        >>> trainer = L.Trainer(callbacks=[LoRA(r=8, alpha=16)], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        target_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        within: Within | None = None,
        variant: Literal["lora", "rslora", "dora"] = "lora",
        init: bool | str = True,
        bias: Literal["none", "all", "lora_only"] = "none",
        backbone: str | None = None,
        name: str = "lora",
        backbone_dropout: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        if r < 1:
            raise ValueError(f"The rank r must be at least 1, got {r}.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        if variant not in ("lora", "rslora", "dora"):
            raise ValueError(f'variant must be "lora", "rslora" or "dora", got {variant!r}.')
        super().__init__(None, backbone, name, backbone_dropout, gradient_checkpointing)  # type: ignore[arg-type]
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.target_modules, self.layers, self.within = target_modules, layers, within
        self.variant, self.init, self.bias = variant, init, bias

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=choose_targets(backbone, self.target_modules, self.layers, self.within),
            use_rslora=self.variant == "rslora",
            use_dora=self.variant == "dora",
            init_lora_weights=self.init,  # type: ignore[arg-type]
            bias=self.bias,
        )
