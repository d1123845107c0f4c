"""The options of AdapterHub's methods that are honoured here, and those that are refused."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lightning_peft.stack.adapter_files.folder import AdapterError

Number = int | float


@dataclass(frozen=True)
class BottleneckOptions:
    """AdapterHub's `BnConfig`; see there for what each option means."""

    mh_adapter: bool
    output_adapter: bool
    reduction_factor: Number | dict[str, Number]
    non_linearity: str
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | str = True
    is_parallel: bool = False
    scaling: Number | str = 1.0
    use_gating: bool = False
    cross_adapter: bool = False
    leave_out: list[int] = field(default_factory=list)
    dropout: Number = 0.0
    stochastic_depth: Number | None = 0.0
    phm_layer: bool = False
    phm_dim: int = 4
    phm_bias: bool | None = True
    factorized_phm_rule: bool | None = False
    learn_phm: bool | None = True

    def factor(self, layer: int) -> float:
        """Return the reduction factor of a layer.

        Raises:
            AdapterError: `reduction_factor` has none for it.
        """
        factor = self.reduction_factor
        if isinstance(factor, dict):
            if str(layer) not in factor and "default" not in factor:
                raise AdapterError(f"AdapterHub's option reduction_factor has neither layer {layer} nor a default.")
            factor = factor.get(str(layer), factor.get("default", 0))
        if not 0 < factor < math.inf:
            raise AdapterError(f"AdapterHub's option reduction_factor must be positive and finite, got {factor}.")
        return factor


@dataclass(frozen=True)
class PrefixOptions:
    """AdapterHub's `PrefixTuningConfig`."""

    encoder_prefix: bool = True
    cross_prefix: bool = True
    leave_out: list[int] = field(default_factory=list)
    flat: bool = False
    prefix_length: int = 30
    bottleneck_size: int = 512
    non_linearity: str = "tanh"
    dropout: Number = 0.0
    use_gating: bool = False


@dataclass(frozen=True)
class LowRankOptions:
    """AdapterHub's `LoRAConfig`, of which its `IA3Config` is a case."""

    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    leave_out: list[int] = field(default_factory=list)
    r: int = 8
    alpha: Number = 8
    dropout: Number = 0.0
    attn_matrices: list[str] = field(default_factory=lambda: ["q", "v"])
    composition_mode: str = "add"
    use_gating: bool = False


@dataclass(frozen=True)
class ReftOptions:
    """AdapterHub's `ReftConfig`. Of its kinds a file says whether R is orthonormal, but not what is subtracted."""

    use_gating: ClassVar[bool] = False

    layers: str | list[int]
    prefix_positions: int
    suffix_positions: int
    r: int
    orthogonality: bool
    tied_weights: bool = False
    subtract_projection: bool | None = None
    dropout: Number = 0.05
    non_linearity: str | None = None

    @property
    def subtracts(self) -> bool:
        """Whether `R h` is subtracted."""
        return self.subtract_projection is not False


Options = BottleneckOptions | PrefixOptions | LowRankOptions | ReftOptions

# options with the one value that is understood, for each class; None and an option that is not there mean the same
_ONLY: dict[type, dict[str, object]] = {
    BottleneckOptions: {
        "ln_before": False,
        "ln_after": False,
        "inv_adapter": None,
        "factorized_phm_W": True,
        "shared_W_phm": False,
        "shared_phm_rule": True,
        "phm_rank": 1,
    },
    PrefixOptions: {"shared_gating": True},
    LowRankOptions: {"use_dora": False, "vera_d": None, "vera_b": None},
    ReftOptions: {"output_reft": True},
}
# they say how training begins, or change nothing where the options above have the value that is understood
_WITHOUT_EFFECT: dict[type, set[str]] = {
    BottleneckOptions: {
        "init_weights",
        "init_weights_seed",
        "phm_c_init",
        "phm_init_range",
        "hypercomplex_nonlinearity",
        "adapter_residual_before_ln",
        "inv_adapter_reduction_factor",
        # of AdapterFusion, in files of the first versions
        "attention_type",
        "new_attention_norm",
    },
    PrefixOptions: {"init_weights_seed"},
    LowRankOptions: {"init_weights", "init_weights_seed", "dtype"},
    ReftOptions: {"init_weights_seed", "dtype"},
}


def read(kind: type[Options], values: Mapping[str, Any], source: str) -> Options:
    """Return a method's options.

    Args:
        kind: the method.
        values: AdapterHub's configuration of it.
        source: where it was read, for messages.

    Raises:
        AdapterError: an option is unknown, of the wrong type, or has a value that nothing here is equal to.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    types, known = typing.get_type_hints(kind), {}
    for name, value in values.items():
        if name == "architecture" or name in _WITHOUT_EFFECT[kind]:
            continue
        if name in _ONLY[kind]:
            if value is not None and value != _ONLY[kind][name]:
                raise AdapterError(
                    f"{source} has AdapterHub's option {name}={value!r}, which no adapter of this package can be; only "
                    f"{_ONLY[kind][name]!r} can be imported."
                )
        elif name not in fields:
            raise AdapterError(f"{source} has the option {name}={value!r}, which is not known here.")
        elif not _is(value, types[name]):
            raise AdapterError(f"{source} has AdapterHub's option {name}={value!r}, which has not the type it should.")
        else:
            known[name] = value
    needed = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING and n not in known]
    if needed:
        raise AdapterError(f"{source} lacks AdapterHub's option {needed[0]}.")
    return kind(**known)


def _is(value: object, kind: Any) -> bool:
    """Return whether a value that JSON knows is of an annotated type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return isinstance(value, list) and all(_is(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(item, arguments[1]) for item in value.values())
    if arguments:
        return any(_is(value, option) for option in arguments)
    return type(value) is kind
