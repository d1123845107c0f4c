"""UniPELT as one callback: three methods, each behind a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Unpack

from torch import nn

from lightning_peft.backbone import counts
from lightning_peft.backbone.parts import attentions
from lightning_peft.backbone.projections import projections
from lightning_peft.backbone.targets import Layers
from lightning_peft.callbacks.tuning.attention_prefix import AttentionPrefix
from lightning_peft.callbacks.tuning.bottleneck import Bottleneck, Reads, reading
from lightning_peft.callbacks.tuning.composite import Composite
from lightning_peft.fitting.adapter_callback import AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig

__all__ = ["UniPELT"]


class GatedLowRank(Bottleneck):
    """LoRA behind a gate, on the matrices that give queries and values: a linear bottleneck beside each.

    Args:
        r: the rank.
        alpha: the product is also multiplied by `alpha / r`; None: the gate stands in place of that.
        dropout: on the product, in training.
        layers: see `LoRA`.
    """

    default_name = "low_rank"

    exempt: Mapping[str, str] = {"merge": "a gate that depends on the token cannot be written into the weights"}

    def __init__(
        self,
        r: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        layers: Layers | list[int] | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if r < 1:
            raise ValueError(f"The rank r must be at least 1, got {r}.")
        settings = {"size": r, "activation": "linear", "biases": False, "placement": "parallel", "gate": True}
        settings |= {"scaling": 1.0 if alpha is None else alpha / r, "dropout": dropout}
        super().__init__(settings, False, None, layers, by_default=("alpha",) if alpha is None else (), **options)

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.bottleneck import BottleneckConfig

        all_projections = [projections(span) for span in attentions(backbone, self.layers)]
        targets = [name for p in all_projections for name in (p.query, p.value) if name]
        config = BottleneckConfig(target_modules=targets, **self.options)
        config.by_default = self._by_default
        return config

    def trainable_parameters(self, backbone: nn.Module) -> int:
        return sum(self.options["size"] * (i + o) + i + 1 for i, o in counts.query_and_value(backbone))


class UniPELT(Composite):
    """LoRA on queries and values, a prefix in attention and an adapter after the feed-forward part, each gated.

    Mao et al. 2022, arXiv:2110.07577, with AdapterHub's sizes. Each gate is `sigmoid(w x + b)` of the input x of what
    it gates, one number for each token, with `w` normal, 0.02, and b zero at the start. The paper takes the mean of
    it over the tokens of a sequence: that mean changes with padding and, in a causal model, lets a token see the
    ones after it and differs between generating with and without a cache. A gate for each token does none of this.

    Trainable parameters: those of `LoRA` and `Pfeiffer` plus inputs + 1 for each adapted matrix, and those of
    `AttentionPrefix(gate=True)`.

    Args:
        r: LoRA's rank.
        alpha: LoRA's product is multiplied by `alpha / r` as well as by its gate. None: the gate stands in place of
            that, as in the authors' code and AdapterHub; an adapter that goes on from a checkpoint or a folder keeps
            its own.
        prefix_length: number of keys and values of the prefix.
        reduction: the model's width divided by the bottleneck's.
        size: width of the bottleneck, in place of `reduction`.
        init: of the prefix, see `AttentionPrefix`.
        dropout: on the outputs of LoRA and adapter, in training.
        layers: which blocks: numbers (0-based), or a rule such as `Layers(last=4)`; default all.
        reads: of the adapter, see `Pfeiffer`.
        **options: see `AdapterOptions`.

    Example:
        >>> from lightning_peft.callbacks import UniPELT
        >>> UniPELT().names
        ('unipelt-low_rank', 'unipelt-adapter', 'unipelt-prefix')
    """

    default_name = "unipelt"

    exempt: Mapping[str, str] = AttentionPrefix.exempt
    law_examples: Mapping[str, LawExample] = {
        "UniPELT": LawExample({"r": 2, "prefix_length": 3, "size": 4}, ("attention", "transformers", "mlp", "stream"))
    }

    def __init__(
        self,
        r: int = 8,
        alpha: float | None = None,
        prefix_length: int = 10,
        reduction: int = 16,
        size: int | None = None,
        init: Literal["identity", "paper"] = "identity",
        dropout: float = 0.0,
        layers: Layers | list[int] | None = None,
        reads: Reads | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        prefix = AttentionPrefix(prefix_length, init, gate=True, layers=layers)
        settings = {"reduction": reduction, "size": size, "activation": "relu", "dropout": dropout, "gate": True}
        adapter = Bottleneck(settings, False, None, layers, **reading(reads))
        methods = {"low_rank": GatedLowRank(r, alpha, dropout, layers), "adapter": adapter, "prefix": prefix}
        super().__init__(methods, **options)
        self.exempt = prefix.exempt
