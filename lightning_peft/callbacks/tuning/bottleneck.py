"""Bottleneck adapters, sequential and parallel, as callbacks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

from torch import nn

from lightning_peft.backbone import counts
from lightning_peft.backbone.parts import part_ends
from lightning_peft.backbone.structure import Span
from lightning_peft.backbone.targets import Layers, choose_targets
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig

__all__ = ["AdapterPlus", "Houlsby", "ParallelAdapter", "Pfeiffer", "ScaledParallelAdapter"]

Activation = Literal["relu", "gelu", "swish", "tanh", "sigmoid", "linear"]
Init = Literal["lora", "mam", "bert", "houlsby", "glorot"]
Scaling = float | Literal["learned", "channel"]
Reads = Literal["stream", "output"]  # of an adapter behind a part
ReadsBeside = Literal["stream", "input"]  # of an adapter beside a part

PLACEMENT = ("reads", "placement", "inputs", "outputs", "norms")  # the fields of a configuration that say where


class Bottleneck(AdapterCallback):
    """The base of the bottleneck methods: it says where their adapters go. Use one of its subclasses.

    Args:
        settings: of `BottleneckConfig`.
        attention: adapt attention parts as well as feed-forward parts.
        target_modules: names of the matrices to add to, in place of the parts' last.
        layers: see `LoRA`.
        reads: `"stream"`, the residual stream; else the part's own output, or beside a part its own input.
        by_default: fields of the configuration that the user left to the method: an adapter that was saved with
            others goes on with those.
        **options: see `AdapterOptions`.
    """

    exempt: Mapping[str, str] = {"merge": "a non-linearity cannot be written into the weights"}
    before_norm = True  # on the stream of post-LN models: add to what the block's last norm takes, not to what it gives

    def __init__(
        self,
        settings: dict[str, Any],
        attention: bool,
        target_modules: list[str] | str | None,
        layers: Layers | list[int] | None,
        reads: Literal["stream", "output", "input"] = "output",
        by_default: Collection[str] = (),
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
        self.reads, self._by_default = reads, frozenset(by_default)

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.bottleneck import BottleneckConfig

        if self.target_modules is not None:
            targets = choose_targets(backbone, self.target_modules, self.layers)
            config = BottleneckConfig(target_modules=targets, **self.options)
        else:
            ends = part_ends(backbone, self.attention, self.layers)
            settings = {**self.options, **self._placed(backbone, ends)}
            config = BottleneckConfig(target_modules=[part.last for part in ends], **settings)
        config.by_default = self._by_default
        return config

    def _placed(self, backbone: nn.Module, ends: Sequence[Span]) -> dict[str, Any]:
        """Return the fields of the configuration that say what is read and what is added to."""
        parallel = self.options.get("placement") == "parallel"
        if self.reads != "stream":
            inputs = {part.last: part.first for part in ends if parallel and part.first != part.last}
            return {"inputs": inputs or None, "reads": self.reads}
        from lightning_peft.tuners.bottleneck.stream import stream_sites

        try:
            sites = stream_sites(backbone, [part.last for part in ends])
        except ValueError as error:
            raise ValueError(f'{error}: give reads="{"input" if parallel else "output"}".') from None
        if parallel:
            inputs = {last: site.before for last, site in sites.items() if site.before != last}
            # without a norm before them, as in post-LN models, parts are given the stream itself
            own = all(site.before == part.first for part, site in zip(ends, sites.values(), strict=True))
            return {"inputs": inputs or None, "reads": "input" if own else "stream"}
        norms = {last: site.norm for last, site in sites.items() if site.norm and self.before_norm}
        behind = {last: site.block for last, site in sites.items() if last not in norms}
        return {"placement": "stream", "outputs": behind or None, "norms": norms or None, "reads": "stream"}

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
    """An adapter on the residual stream behind each feed-forward part: `h + s * up(f(down(h)))`.

    Pfeiffer et al. 2021, arXiv:2005.00247, as in AdapterHub: the adapter reads the sum of the part's output and the
    residual, after the block's norm N where that follows (post-LN models, such as BERT): there it is
    `N(x + s * up(f(down(N(x)))))`, x the sum. Trainable parameters: `2 * d * m + m + d` for each block.

    Args:
        reduction: see `Houlsby`.
        size: see `Houlsby`.
        activation: see `Houlsby`.
        scaling: see `Houlsby`.
        init: see `Houlsby`.
        dropout: see `Houlsby`.
        target_modules: names of matrices to add to, each to its own output, in place of the stream.
        layers: see `Houlsby`.
        reads: `"stream"`, or `"output"`: the part's output alone, as Houlsby's adapters, `y + s * up(f(down(y)))`.
            None: `"stream"`, and an adapter that goes on from a checkpoint or a folder stays where it was.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: at `setup`, in one sentence: the backbone shows no residual stream, or `reads="stream"` with
            target_modules.
    """

    default_name = "pfeiffer"
    law_examples: Mapping[str, LawExample] = {
        "Pfeiffer": LawExample({"size": 4}, ("mlp", "stream")),
        'Pfeiffer(reads="output")': LawExample({"size": 4, "reads": "output"}, ("mlp",)),
        "Pfeiffer in 4 bits": LawExample({"size": 4}, ("mlp", "stream"), four_bits=True),
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
        reads: Reads | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        settings = {"reduction": reduction, "size": size, "activation": activation, "scaling": scaling}
        super().__init__(
            {**settings, "init": init, "dropout": dropout},
            False,
            target_modules,
            layers,
            **reading(reads, target_modules),
            **options,
        )


class ParallelAdapter(Bottleneck):
    """An adapter beside each feed-forward part: `mlp(norm(x)) + s * up(f(down(x)))`, x the residual stream.

    He et al. 2022, arXiv:2110.04366, as in their code and in AdapterHub: x is what the part's norm is given, in
    post-LN models, which have none there, what the part is given. Trainable parameters: `2 * d * m + m + d` for each
    block.

    Args:
        reduction: see `Houlsby`.
        size: see `Houlsby`.
        activation: see `Houlsby`.
        scaling: s: a number, `"learned"` or `"channel"`, see `Houlsby`. None: 4, and an adapter that goes on from a
            checkpoint or a folder keeps its own.
        init: see `Houlsby`.
        dropout: see `Houlsby`.
        layers: see `Houlsby`.
        reads: `"stream"`, or `"input"`: what the part's first matrix is given, in pre-LN models `norm(x)`. None:
            `"stream"`, and an adapter that goes on from a checkpoint or a folder stays where it was.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: at `setup`, in one sentence: no part is found, or the backbone shows no residual stream.
    """

    default_name = "parallel"
    law_examples: Mapping[str, LawExample] = {"ParallelAdapter": LawExample({"size": 4}, ("mlp", "stream"))}

    def __init__(
        self,
        reduction: int = 2,
        size: int | None = None,
        activation: Activation = "relu",
        scaling: Scaling | None = None,
        init: Init = "lora",
        dropout: float = 0.0,
        layers: Layers | list[int] | None = None,
        reads: ReadsBeside | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        settings: dict[str, Any] = {"reduction": reduction, "size": size, "activation": activation}
        settings["scaling"], placing = 4.0 if scaling is None else scaling, reading(reads)
        if scaling is None:
            placing["by_default"] = (*placing["by_default"], "alpha")
        super().__init__(
            {**settings, "init": init, "dropout": dropout, "placement": "parallel"},
            False,
            None,
            layers,
            **placing,
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
        reads: see `ParallelAdapter`.
        **options: see `AdapterOptions`.
    """

    default_name = "scaled_parallel"
    law_examples: Mapping[str, LawExample] = {"ScaledParallelAdapter": LawExample({"size": 4}, ("mlp", "stream"))}

    def __init__(
        self,
        size: int = 512,
        scaling: Scaling = 4.0,
        activation: Activation = "relu",
        init: Init = "mam",
        dropout: float = 0.0,
        layers: Layers | list[int] | None = None,
        reads: ReadsBeside | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        super().__init__(
            size=size,
            scaling=scaling,
            activation=activation,
            init=init,
            dropout=dropout,
            layers=layers,
            reads=reads,
            **options,
        )


class AdapterPlus(Bottleneck):
    """An adapter on the residual stream behind each block, `h + s * up(f(down(h)))`, made for vision transformers.

    Steitz & Roth 2024, arXiv:2406.06820, whose Post-Adapter this is: s is trained, one for each channel, and there is
    stochastic depth. h is what the block gives, in post-LN models too. Trainable parameters:
    `2 * d * m + m + 2 * d` for each block.

    Args:
        reduction: see `Houlsby`.
        size: see `Houlsby`.
        activation: see `Houlsby`.
        drop_path: the chance of leaving the adapter out for a row, in training.
        init: see `Houlsby`; the paper's is `"houlsby"`.
        dropout: see `Houlsby`.
        target_modules: see `Pfeiffer`.
        layers: see `Houlsby`.
        reads: see `Pfeiffer`.
        **options: see `AdapterOptions`.
    """

    default_name = "adapter_plus"
    before_norm = False
    law_examples: Mapping[str, LawExample] = {
        "AdapterPlus": LawExample({"size": 4, "init": "lora", "drop_path": 0.0}, ("mlp", "stream"))
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
        reads: Reads | None = None,
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
            **reading(reads, target_modules),
            **options,
        )


def reading(reads: str | None, target_modules: Collection[str] | str | None = None) -> dict[str, Any]:
    """Return what `Bottleneck` is told of an argument `reads` whose default is the stream."""
    if target_modules is None:
        return {"reads": reads or "stream", "by_default": PLACEMENT if reads is None else ()}
    if reads == "stream":
        raise ValueError(
            'target_modules names matrices, each of which is added to at its own output, and reads="stream" another '
            "place: give one of them."
        )
    return {"reads": "output", "by_default": ()}
