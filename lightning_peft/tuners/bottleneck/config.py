"""The configuration of a bottleneck adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from peft.config import PeftConfig

from lightning_peft.stack.registration import add_peft_type
from lightning_peft.tuners.config import WithCard
from lightning_peft.tuners.targets import order_targets

PLACEMENTS = ("sequential", "parallel", "stream")
READS = {"sequential": ("output",), "parallel": ("input", "stream"), "stream": ("stream",)}
SCALINGS = ("fixed", "learned", "channel")
ACTIVATIONS = ("relu", "gelu", "swish", "tanh", "sigmoid", "linear")
INITS = ("lora", "mam", "bert", "houlsby", "glorot")


@dataclass
class BottleneckConfig(WithCard, PeftConfig):
    """A trained `b(z) = alpha * scale * up(f(down(z)))` at a frozen matrix, which gives `y`, or at the residual stream.

    Sequential: `y + b(y)` (Houlsby et al. 2019, arXiv:1902.00751). Parallel: `y + b(z)`, where z is the input of the
    matrix itself, or that of another module, so that the whole part between the two has the adapter beside it (He et
    al. 2022, arXiv:2110.04366). On the stream: `h + b(h)`, where h is what another module gives (Steitz & Roth 2024,
    arXiv:2406.06820); or, where that module is a norm N of the sum s of a part and what it was given, `N(s + b(N(s)))`
    (Pfeiffer et al. 2021, arXiv:2005.00247). `lightning_peft.tuners.bottleneck.stream` finds these modules.

    Args:
        target_modules: the matrices, by name or suffix, which keep the adapters' parameters and, by what they give,
            say how wide an adapter is; a string is a regular expression. Default: the last matrix of every feed-forward
            part.
        placement: `"sequential"`, `"parallel"` or `"stream"`.
        inputs: parallel only, for targets by full name the module whose input is z; others take their own.
        outputs: on the stream only, for targets by full name the module that gives h.
        norms: on the stream only, for the other targets by full name the norm N.
        reads: what z is, in a word: `"output"` of the target, `"input"` of the part, or the residual `"stream"`. The
            names above say where that is. None, as in configurations of earlier releases: `"input"` where the
            placement is parallel, `"stream"` where it is that, else `"output"`.
        size: width of the bottleneck; or
        reduction: the output's width divided by that of the bottleneck (at least 1; with `kronecker` rounded up to a
            multiple of it). Without either, 16.
        activation: f: `"relu"`, `"gelu"`, `"swish"`, `"tanh"`, `"sigmoid"` or `"linear"`.
        alpha: the strength, a number.
        scaling: `"fixed"`, or also a trained `scale`, 1 at the start: one (`"learned"`) or one a `"channel"`.
        init: `"lora"` and `"mam"` (both Kaiming-uniform down, zero up: the adapter begins as nothing), `"bert"`
            (normal, 0.02), `"houlsby"` (normal, 0.01, truncated at two deviations) or `"glorot"` (normal).
        biases: whether down and up have one; zero at the start.
        dropout: on the adapter's output, in training.
        drop_path: the chance of leaving the adapter out for a row, in training (stochastic depth).
        gate: multiply by `sigmoid(w z + b)`, a number for each token, with `w` normal, 0.02, at the start.
        kronecker: n, where down and up are `sum_i A_i (x) s_i t_i` with n matrices `A_i [n, n]` that all layers share
            (Mahabadi et al. 2021, arXiv:2106.04647); n must divide every width. 0: plain matrices.
        kronecker_std: of the `A_i` at the start; the authors' 0.01.
        tensor_rank: where down and up are tensor trains (Yang et al. 2024, arXiv:2402.11417), the largest rank between
            two cores, see `lightning_peft.tuners.tensor_train`. 0: plain matrices.
        exclude_modules: names left out of `target_modules`.
        modules_to_save: other modules to train and save whole, as in every peft method.
        layers_to_transform: the numbers of the blocks in which `target_modules`, given by suffixes, are adapted.
        layers_pattern: the name of the list of blocks, where it is not the first in a module's name.
    """

    implies: ClassVar[Mapping[str, tuple[str, ...]]] = {"reads": ("placement", "inputs", "outputs", "norms")}

    target_modules: list[str] | str | None = field(default=None)
    placement: str = field(default="sequential")
    inputs: dict[str, str] | None = field(default=None)
    outputs: dict[str, str] | None = field(default=None)
    norms: dict[str, str] | None = field(default=None)
    reads: str | None = field(default=None)
    size: int | None = field(default=None)
    reduction: int | None = field(default=None)
    activation: str = field(default="relu")
    alpha: float = field(default=1.0)
    scaling: str = field(default="fixed")
    init: str = field(default="lora")
    biases: bool = field(default=True)
    dropout: float = field(default=0.0)
    drop_path: float = field(default=0.0)
    gate: bool = field(default=False)
    kronecker: int = field(default=0)
    kronecker_std: float = field(default=0.01)
    tensor_rank: int = field(default=0)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("BOTTLENECK")
        order_targets(self)
        # fields that nobody chose: an adapter that was saved with others goes on as it was; not a field itself
        self.by_default: frozenset[str] = frozenset()
        for name, known in (
            ("placement", PLACEMENTS),
            ("scaling", SCALINGS),
            ("activation", ACTIVATIONS),
            ("init", INITS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if self.size is not None and self.reduction is not None:
            raise ValueError(f"Give size or reduction, got size={self.size} and reduction={self.reduction}.")
        if self.size is None and self.reduction is None:
            self.reduction = 16
        for name in ("size", "reduction"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"The bottleneck's {name} must be positive, got {value}.")
        for name in ("dropout", "drop_path"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if self.inputs and self.placement != "parallel":
            raise ValueError(f"Only a parallel adapter has inputs of its own, and this one is {self.placement}.")
        if bool(self.outputs or self.norms) != (self.placement == "stream"):
            raise ValueError(
                f"outputs or norms and the placement 'stream' go together, got outputs={self.outputs}, norms="
                f"{self.norms} and the placement {self.placement!r}."
            )
        self.reads = READS[self.placement][0] if self.reads is None else self.reads
        if self.reads not in READS[self.placement]:
            raise ValueError(
                f"With the placement {self.placement!r} an adapter reads {' or '.join(READS[self.placement])}, "
                f"got reads={self.reads!r}."
            )
        if self.kronecker < 0:
            raise ValueError(f"kronecker must not be negative, got {self.kronecker}.")
        if self.kronecker and self.init not in ("lora", "mam", "glorot"):
            raise ValueError(f"Kronecker factors begin as lora, mam or glorot, not as {self.init}.")
        if self.tensor_rank < 0:
            raise ValueError(f"tensor_rank must not be negative, got {self.tensor_rank}.")
        if self.tensor_rank and self.init not in ("lora", "mam", "glorot"):
            raise ValueError(f"Tensor trains begin as lora, mam or glorot, not as {self.init}.")
        if self.kronecker and self.tensor_rank:
            raise ValueError(
                f"A matrix is a sum of Kronecker products or a tensor train, got kronecker={self.kronecker} and "
                f"tensor_rank={self.tensor_rank}."
            )

    def size_for(self, width: int) -> int:
        """Return the bottleneck's width beside an output of `width` features."""
        if self.size is not None:
            return self.size
        assert self.reduction is not None
        size, step = max(1, width // self.reduction), max(1, self.kronecker)
        return -(-size // step) * step

    def merges(self) -> bool:
        """Return whether the adapter is a linear map that the matrix itself can take up."""
        elsewhere = self.inputs or self.placement == "stream"
        return self.activation == "linear" and not (self.biases or self.gate or elsewhere)

    def sites(self) -> dict[str, str]:
        """Return for targets by full name the other module that each reads or adds to."""
        return {**(self.inputs or {}), **(self.outputs or {}), **(self.norms or {})}
