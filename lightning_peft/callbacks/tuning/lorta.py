"""LoRTA as one callback."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Unpack

from torch import nn

from lightning_peft.backbone.heads import head_sites
from lightning_peft.backbone.structure import matrix_shape
from lightning_peft.backbone.targets import Layers, choose_targets
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.configs import PeftConfig


class LoRTA(AdapterCallback):
    """Train one CP tensor of rank r for the updates of all attention matrices, of all their heads and layers.

    Head h of the queries, keys and values m of layer l has `y_h + alpha/r ((x A) ∘ c) B` with `c = C_l[l] ∘ C_h[h] ∘
    C_m[m]`; of the output projection, whose inputs are the heads, `y + alpha/r Σ_h ((x_h Bᵀ) ∘ c) Aᵀ`. Hounie et al.
    2024, arXiv:2410.04060. Trainable parameters: `r (d + d_h + L + H + 4)`, d the stream's width, d_h a head's, L the
    adapted attentions, H the query heads.

    Args:
        r: the rank.
        alpha: the update is multiplied by `alpha / r`.
        dropout: on the matrices' inputs, in training.
        init_scale: C_l, C_h and C_m are drawn as Kaiming-uniform with `a = √5 * init_scale`.
        target_modules: which of the matrices that give queries, keys or values, and of the output projections, by name
            or suffix; a string is a regular expression. Default: all.
        layers: which blocks to adapt: numbers (0-based), or a rule such as `Layers(last=4)`; default all.
        within: the part of the model whose attentions are meant, see `lightning_peft.backbone.language_model`; default
            the language model.
        fused: how one matrix for queries, keys and values orders its outputs: `"concatenated"` (all queries, all keys,
            all values) or `"interleaved"` (those of each head). Default: as it is known of the model.
        num_heads: for models without a configuration, how many query heads there are.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: at `setup`, in one sentence: the model has no attention whose heads are known.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import LoRTA
        >>> trainer = L.Trainer(callbacks=[LoRTA(r=16)], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    default_name = "lorta"
    law_examples: Mapping[str, LawExample] = {"LoRTA": LawExample({"r": 4}, ("attention", "transformers"))}

    def __init__(
        self,
        r: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.0,
        init_scale: float = 0.0,
        target_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        within: str | None = None,
        fused: Literal["concatenated", "interleaved"] | None = None,
        num_heads: int | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        super().__init__(**options)
        self.r, self.alpha, self.dropout, self.init_scale = r, alpha, dropout, init_scale
        self.target_modules, self.layers, self.within = target_modules, layers, within
        self.fused, self.num_heads = fused, num_heads

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.lorta import LoRTAConfig
        from lightning_peft.tuners.lorta.places import attention_matrices

        targets = self.target_modules
        if targets is None:
            targets = attention_matrices(backbone, self.within, self.num_heads)
        return LoRTAConfig(
            target_modules=choose_targets(backbone, targets, self.layers, self.within),
            r=self.r,
            alpha=self.alpha,
            dropout=self.dropout,
            init_scale=self.init_scale,
            fused=self.fused,
            num_heads=self.num_heads,
        )

    def trainable_parameters(self, backbone: nn.Module) -> int:
        sites = head_sites(backbone, num_heads=self.num_heads, within=self.within)
        widths = (matrix_shape(backbone.get_submodule(site.name))[1] for site in sites)
        layers = Counter((width, site.head_dim, site.num_heads) for width, site in zip(widths, sites, strict=True))
        return self.r * sum(sum(sizes) + count + 4 for sizes, count in layers.items())
