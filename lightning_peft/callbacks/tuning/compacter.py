"""Compacter and Compacter++ as callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from torch import nn

from lightning_peft.backbone.targets import Layers
from lightning_peft.callbacks.tuning.bottleneck import Activation, Bottleneck, Init, Reads, Scaling, reading
from lightning_peft.fitting.adapter_callback import AdapterOptions
from lightning_peft.fitting.law_example import LawExample


class Compacter(Bottleneck):
    """Houlsby's adapters with matrices `W = sum_i A_i (x) s_i t_i`, i = 1…n; all layers share the `A_i [n, n]`.

    Mahabadi et al. 2021, arXiv:2106.04647. Trainable parameters: `n**3` once, and for each part `3 * (d + m)`: the
    factors of down and up, `d + m` each, and their biases; d is the output's width and m the bottleneck's. The
    paper also trains the norms; this does not.

    Args:
        n: the number of products; it must divide d and m.
        reduction: the output's width divided by the bottleneck's, which is rounded up to a multiple of n.
        size: width of the bottleneck, in place of `reduction`.
        activation: between down and up.
        scaling: see `Houlsby`.
        init: `"lora"` and `"mam"` begin with `up` zero; `"glorot"` is the paper's.
        dropout: see `Houlsby`.
        target_modules: see `Houlsby`.
        layers: see `Houlsby`.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: at `setup`, in one sentence: n does not divide a width.

    Example:
        >>> from lightning_peft.callbacks import Compacter
        >>> Compacter(n=4).options["kronecker"]
        4
    """

    default_name = "compacter"

    attention_too = True
    law_examples: Mapping[str, LawExample] = {"Compacter": LawExample({"n": 4, "size": 4}, ("mlp",))}

    def __init__(
        self,
        n: int = 4,
        reduction: int = 32,
        size: int | None = None,
        activation: Activation = "gelu",
        scaling: Scaling = 1.0,
        init: Init = "lora",
        dropout: float = 0.0,
        target_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if n < 1:
            raise ValueError(f"The number n of Kronecker products must be at least 1, got {n}.")
        settings = {"reduction": reduction, "size": size, "activation": activation, "scaling": scaling}
        super().__init__(
            {**settings, "init": init, "dropout": dropout, "kronecker": n},
            self.attention_too,
            target_modules,
            layers,
            **options,
        )

    def trainable_parameters(self, backbone: nn.Module) -> int:
        return self.options["kronecker"] ** 3 + super().trainable_parameters(backbone)

    def _added(self, inputs: int, outputs: int) -> int:
        from lightning_peft.tuners.bottleneck import BottleneckConfig

        return 3 * (outputs + BottleneckConfig(target_modules=[""], **self.options).size_for(outputs))


class CompacterPlusPlus(Compacter):
    """Compacter after feed-forward parts only, `y + s * up(f(down(y)))`, y the part's output.

    Mahabadi et al. 2021, arXiv:2106.04647, as in the authors' code for T5. Trainable parameters: `n**3` once, and
    `3 * (d + m)` for each block.

    Args:
        n: see `Compacter`.
        reduction: see `Compacter`.
        size: see `Compacter`.
        activation: see `Compacter`.
        scaling: see `Houlsby`.
        init: see `Compacter`.
        dropout: see `Houlsby`.
        target_modules: see `Pfeiffer`.
        layers: see `Houlsby`.
        reads: `"output"`, or `"stream"`: Pfeiffer's place, which AdapterHub gives it.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: as `Compacter` and `Pfeiffer`.
    """

    attention_too = False
    law_examples: Mapping[str, LawExample] = {
        "CompacterPlusPlus": LawExample({"n": 4, "size": 4}, ("mlp",)),
        'CompacterPlusPlus(reads="stream")': LawExample({"n": 4, "size": 4, "reads": "stream"}, ("mlp", "stream")),
    }

    def __init__(
        self,
        n: int = 4,
        reduction: int = 32,
        size: int | None = None,
        activation: Activation = "gelu",
        scaling: Scaling = 1.0,
        init: Init = "lora",
        dropout: float = 0.0,
        target_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        reads: Reads = "output",
        **options: Unpack[AdapterOptions],
    ) -> None:
        super().__init__(n, reduction, size, activation, scaling, init, dropout, target_modules, layers, **options)
        self.reads = reading(reads, target_modules)["reads"]
