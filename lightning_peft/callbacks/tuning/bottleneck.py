"""Bottleneck adapters, sequential and parallel, as callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Unpack

from torch import nn

from lightning_peft.backbone import counts
from lightning_peft.backbone.parts import part_ends
from lightning_peft.backbone.targets import Layers, choose_targets
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig

__all__ = ["AdapterPlus", "Houlsby", "ParallelAdapter", "Pfeiffer", "ScaledParallelAdapter"]

Activation = Literal["relu", "gelu", "swish", "tanh", "sigmoid", "linear"]
Init = Literal["lora", "mam", "bert", "houlsby", "glorot"]
Scaling = float | Literal["learned", "channel"]


class Bottleneck(AdapterCallback):
    """The base of the bottleneck methods: it says where their adapters go. Use one of its subclasses.

    Args:
        settings: of `BottleneckConfig`.
        attention: adapt attention parts as well as feed-forward parts.
        target_modules: names of the matrices to add to, in place of the parts' last.
        layers: see `LoRA`.
        **options: see `AdapterOptions`.
    """

    exempt: Mapping[str, str] = {"merge": "a non-linearity cannot be written into the weights"}

    def __init__(
        self,
        settings: dict[str, Any],
        attention: bool,
        target_modules: list[str] | str | None,
        layers: Layers | list[int] | None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        super().__init__(**options)
        scaling = settings.pop("scaling", 1.0)
        fixed = isinstance(scaling, int | float)
        settings |= {"alpha": float(scaling), "scaling": "fixed"} if fixed else {"scaling": scaling}
        if settings.get("size") is not None:
            settings["reduction"] = None
        if settings.get("init", "lora") not in ("lora", "mam"):
            self.exempt = {**self.exempt, "identity": f"init={settings['init']!r} does not begin at zero"}
        if settings.get("dropout") or settings.get("drop_path"):
            self.exempt = {**self.exempt, "resume": "what is dropped is drawn anew: checkpoints hold no random state"}
        self.options, self.attention = settings, attention
        self.target_modules, self.layers = target_modules, layers

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.bottleneck import BottleneckConfig

        if self.target_modules is not None:
            return BottleneckConfig(
                target_modules=choose_targets(backbone, self.target_modules, self.layers), **self.options
            )
        ends = part_ends(backbone, self.attention, self.layers)
        inputs = None
        if self.options.get("placement") == "parallel":
            inputs = {part.last: part.first for part in ends if part.first != part.last}
        return BottleneckConfig(target_modules=[part.last for part in ends], inputs=inputs or None, **self.options)

    def trainable_parameters(self, backbone: nn.Module) -> int:
        return sum(self._added(*shape) for shape in counts.parts(backbone, self.attention))

    def _added(self, inputs: int, outputs: int) -> int:
        """Return the number of parameters of one adapter, at a part of these widths."""
        from lightning_peft.tuners.bottleneck import BottleneckConfig

        entering = inputs if self.options.get("placement") == "parallel" else outputs
        size = BottleneckConfig(target_modules=[""], **self.options).size_for(outputs)
        gate = entering + 1 if self.options.get("gate") else 0
        scales = {"channel": outputs, "learned": 1}.get(self.options["scaling"], 0)
        return entering * size + size + size * outputs + outputs + scales + gate


class Houlsby(Bottleneck):
    """An adapter after each attention and each feed-forward part: `y + s * up(f(down(y)))`, y the part's output.

    Houlsby et al. 2019, arXiv:1902.00751; activation and reduction as in AdapterHub. Trainable parameters:
    `2 * d * m + m + d` for each part, with d the output's width and m the bottleneck's.

    Args:
        reduction: the output's width divided by the bottleneck's.
        size: width of the bottleneck, in place of `reduction`.
        activation: f.
        scaling: s: a number, `"learned"` (one, 1 at the start) or `"channel"` (one for each output).
        init: `"lora"` and `"mam"` begin with `up` zero, so that training starts at the base model; `"bert"`,
            `"houlsby"` and `"glorot"` near it, see `BottleneckConfig`.
        dropout: on the adapter's output, in training.
        target_modules: names of the matrices to add to, in place of the parts' last ones.
        layers: which blocks: numbers (0-based), or a rule such as `Layers(last=4)`; default all.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: at `setup`, in one sentence: no part is found, or a number is out of its range.

    Example:
        >>> from lightning_peft.callbacks import Houlsby
        >>> Houlsby(size=64).options["size"]
        64
    """

    default_name = "houlsby"
    law_examples: Mapping[str, LawExample] = {"Houlsby": LawExample({"size": 4}, ("mlp",))}

    def __init__(
        self,
        reduction: int = 16,
        size: int | None = None,
        activation: Activation = "swish",
        scaling: Scaling = 1.0,
        init: Init = "lora",
        dropout: float = 0.0,
        target_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        settings = {"reduction": reduction, "size": size, "activation": activation, "scaling": scaling}
        super().__init__(
            {**settings, "init": init, "dropout": dropout},
            True,
            target_modules,
            layers,
            **options,
        )


class Pfeiffer(Bottleneck):
    """An adapter after each feed-forward part: half of Houlsby's.

    Pfeiffer et al. 2021, arXiv:2005.00247. Trainable parameters: `2 * d * m + m + d` for each block.

    Args:
        reduction: see `Houlsby`.
        size: see `Houlsby`.
        activation: see `Houlsby`.
        scaling: see `Houlsby`.
        init: see `Houlsby`.
        dropout: see `Houlsby`.
        target_modules: see `Houlsby`.
        layers: see `Houlsby`.
        **options: see `AdapterOptions`.
    """

    default_name = "pfeiffer"
    law_examples: Mapping[str, LawExample] = {
        "Pfeiffer": LawExample({"size": 4}, ("mlp",)),
        "Pfeiffer in 4 bits": LawExample({"size": 4}, ("mlp",), four_bits=True),
    }

    def __init__(
        self,
        reduction: int = 16,
        size: int | None = None,
        activation: Activation = "relu",
        scaling: Scaling = 1.0,
        init: Init = "lora",
        dropout: float = 0.0,
        target_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        settings = {"reduction": reduction, "size": size, "activation": activation, "scaling": scaling}
        super().__init__(
            {**settings, "init": init, "dropout": dropout},
            False,
            target_modules,
            layers,
            **options,
        )


class ParallelAdapter(Bottleneck):
    """An adapter beside each feed-forward part: `mlp(x) + s * up(f(down(x)))`, x the part's input.

    He et al. 2022, arXiv:2110.04366. Trainable parameters: `2 * d * m + m + d` for each block.

    Args:
        reduction: see `Houlsby`.
        size: see `Houlsby`.
        activation: see `Houlsby`.
        scaling: see `Houlsby`.
        init: see `Houlsby`.
        dropout: see `Houlsby`.
        layers: see `Houlsby`.
        **options: see `AdapterOptions`.
    """

    default_name = "parallel"
    law_examples: Mapping[str, LawExample] = {"ParallelAdapter": LawExample({"size": 4}, ("mlp",))}

    def __init__(
        self,
        reduction: int = 2,
        size: int | None = None,
        activation: Activation = "relu",
        scaling: Scaling = 1.0,
        init: Init = "lora",
        dropout: float = 0.0,
        layers: Layers | list[int] | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        settings = {"reduction": reduction, "size": size, "activation": activation, "scaling": scaling}
        super().__init__(
            {**settings, "init": init, "dropout": dropout, "placement": "parallel"},
            False,
            None,
            layers,
            **options,
        )


class ScaledParallelAdapter(ParallelAdapter):
    """A parallel adapter with the scaling and the width that He et al. found best: s = 4, 512 wide.

    He et al. 2022, arXiv:2110.04366. Trainable parameters: `2 * d * size + size + d` for each block.

    Args:
        size: width of the bottleneck.
        scaling: see `Houlsby`.
        activation: see `Houlsby`.
        init: see `Houlsby`.
        dropout: see `Houlsby`.
        layers: see `Houlsby`.
        **options: see `AdapterOptions`.
    """

    default_name = "scaled_parallel"
    law_examples: Mapping[str, LawExample] = {"ScaledParallelAdapter": LawExample({"size": 4}, ("mlp",))}

    def __init__(
        self,
        size: int = 512,
        scaling: Scaling = 4.0,
        activation: Activation = "relu",
        init: Init = "mam",
        dropout: float = 0.0,
        layers: Layers | list[int] | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        super().__init__(
            size=size,
            scaling=scaling,
            activation=activation,
            init=init,
            dropout=dropout,
            layers=layers,
            **options,
        )


class AdapterPlus(Bottleneck):
    """A Pfeiffer adapter with a trained scale for each channel and stochastic depth, made for vision transformers.

    Steitz & Roth 2024, arXiv:2406.06820. Trainable parameters: `2 * d * m + m + 2 * d` for each block.

    Args:
        reduction: see `Houlsby`.
        size: see `Houlsby`.
        activation: see `Houlsby`.
        drop_path: the chance of leaving the adapter out for a row, in training.
        init: see `Houlsby`; the paper's is `"houlsby"`.
        dropout: see `Houlsby`.
        target_modules: see `Houlsby`.
        layers: see `Houlsby`.
        **options: see `AdapterOptions`.
    """

    default_name = "adapter_plus"
    law_examples: Mapping[str, LawExample] = {
        "AdapterPlus": LawExample({"size": 4, "init": "lora", "drop_path": 0.0}, ("mlp",))
    }

    def __init__(
        self,
        reduction: int = 96,
        size: int | None = None,
        activation: Activation = "gelu",
        drop_path: float = 0.1,
        init: Init = "lora",
        dropout: float = 0.0,
        target_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        settings = {
            "reduction": reduction,
            "size": size,
            "activation": activation,
            "scaling": "channel",
        }
        super().__init__(
            {**settings, "init": init, "dropout": dropout, "drop_path": drop_path},
            False,
            target_modules,
            layers,
            **options,
        )
