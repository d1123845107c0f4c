"""Mix-and-match adapters as one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Unpack

from lightning_peft.backbone.targets import Layers
from lightning_peft.callbacks.tuning.attention_prefix import AttentionPrefix
from lightning_peft.callbacks.tuning.bottleneck import ReadsBeside, ScaledParallelAdapter, Scaling
from lightning_peft.callbacks.tuning.composite import Composite
from lightning_peft.fitting.adapter_callback import AdapterOptions
from lightning_peft.fitting.law_example import LawExample


class MAM(Composite):
    """A short prefix in each attention, and a scaled parallel adapter beside each feed-forward part.

    He et al. 2022, arXiv:2110.04366. Trainable parameters: those of `AttentionPrefix` and `ScaledParallelAdapter`.

    Args:
        prefix_length: number of keys and values of the prefix.
        size: width of the bottleneck.
        scaling: of the bottleneck: a number, `"learned"` or `"channel"`.
        init: of the prefix, see `AttentionPrefix`.
        dropout: on the parallel adapter's output, in training.
        layers: which blocks: numbers (0-based), or a rule such as `Layers(last=4)`; default all.
        reads: of the bottleneck, see `ParallelAdapter`.
        **options: see `AdapterOptions`.

    Example:
        >>> from lightning_peft.callbacks import MAM
        >>> MAM(size=64).names
        ('mam-parallel', 'mam-prefix')
    """

    default_name = "mam"

    exempt: Mapping[str, str] = AttentionPrefix.exempt
    law_examples: Mapping[str, LawExample] = {
        "MAM": LawExample({"prefix_length": 3, "size": 4}, ("attention", "transformers", "mlp", "stream"))
    }

    def __init__(
        self,
        prefix_length: int = 30,
        size: int = 512,
        scaling: Scaling = 4.0,
        init: Literal["identity", "paper"] = "identity",
        dropout: float = 0.0,
        layers: Layers | list[int] | None = None,
        reads: ReadsBeside | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        prefix = AttentionPrefix(prefix_length, init, layers=layers)
        parallel = ScaledParallelAdapter(size, scaling, dropout=dropout, layers=layers, reads=reads)
        super().__init__(
            {"parallel": parallel, "prefix": prefix},
            **options,
        )
        self.exempt = prefix.exempt
