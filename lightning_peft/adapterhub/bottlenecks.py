"""AdapterHub's bottleneck adapters as this package's: Houlsby, Pfeiffer, parallel, Adapter+, Compacter."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_peft.adapterhub.options import BottleneckOptions
from lightning_peft.adapterhub.part import ROOT, Part
from lightning_peft.adapterhub.places import AdapterPlace, Places
from lightning_peft.adapterhub.tensors import Tensors
from lightning_peft.backbone.structure import matrix_shape
from lightning_peft.stack.adapter_files.folder import AdapterError

_ACTIVATIONS = {name: name for name in ("relu", "gelu", "swish", "tanh", "sigmoid", "linear")} | {"silu": "swish"}


def bottlenecks(options: BottleneckOptions, tensors: Tensors, places: Places) -> list[Part]:
    """Return the adapters; several where the width differs between layers.

    Raises:
        AdapterError: an option has no equal here, or a tensor is missing or of another shape.
    """
    chosen = [
        place
        for option in ("mh_adapter", "cross_adapter", "output_adapter")
        if getattr(options, option)
        for place in places.adapters(option, options.leave_out)
    ]
    if not chosen:
        raise AdapterError(f"{tensors.source} has a bottleneck adapter without a place: its options leave out all.")
    rule = _rule(options, tensors)
    by_size: dict[int, list[AdapterPlace]] = {}
    for place in places.in_order(chosen):
        width = matrix_shape(places.modules[place.ours])[1]
        by_size.setdefault(max(1, int(width // options.factor(place.layer))), []).append(place)
    parts = []
    for size, members in by_size.items():
        name = "adapter" if len(by_size) == 1 else f"adapter-{size}-wide"
        kept = {} if rule is None else {f"{ROOT}{members[0].ours}.bottleneck_rule": rule}
        for place in members:
            width = matrix_shape(places.modules[place.ours])[1]
            kept |= _network(options, tensors, place, width, size)
        parts.append(Part(name, _config(options, members, size), kept))
    return parts


def _config(options: BottleneckOptions, places: list[AdapterPlace], size: int) -> Any:
    from lightning_peft.tuners.bottleneck import BottleneckConfig

    if options.non_linearity.lower() not in _ACTIVATIONS:
        raise AdapterError(
            f"AdapterHub's option non_linearity={options.non_linearity!r} has no equal here; these have: "
            f"{', '.join(_ACTIVATIONS)}."
        )
    learned = isinstance(options.scaling, str)
    if learned and options.scaling not in ("learned", "channel"):
        raise AdapterError(f"AdapterHub's option scaling={options.scaling!r} is neither a number, learned nor channel.")
    return BottleneckConfig(
        target_modules=[place.ours for place in places],
        size=size,
        activation=_ACTIVATIONS[options.non_linearity.lower()],
        alpha=1.0 if isinstance(options.scaling, str) else float(options.scaling),
        scaling=options.scaling if isinstance(options.scaling, str) else "fixed",
        biases=bool(options.phm_bias) or not options.phm_layer,
        dropout=float(options.dropout),
        drop_path=float(options.stochastic_depth or 0.0),
        gate=options.use_gating,
        kronecker=options.phm_dim if options.phm_layer else 0,
        init="glorot",
        **_placement(options, places),
    )


def _placement(options: BottleneckOptions, places: list[AdapterPlace]) -> dict[str, Any]:
    """Return where the adapters read and add, which AdapterHub says by three options about norms and residuals."""
    before, residual, after = options.original_ln_before, options.residual_before_ln, options.original_ln_after
    if options.is_parallel and after:
        return {"placement": "parallel", "inputs": {place.ours: place.before for place in places}}
    if not options.is_parallel and not before and residual in (True, False) and after:
        return {"placement": "sequential"}
    pfeiffer, plus = (residual is True and after), (residual is False and not after)
    if options.is_parallel or not before or not (pfeiffer or plus):
        raise AdapterError(
            f"AdapterHub's options original_ln_before={before}, residual_before_ln={residual!r}, original_ln_after="
            f"{after} and is_parallel={options.is_parallel} are together no placement of this package."
        )
    if hidden := [place for place in places if place.behind is None]:
        raise AdapterError(
            f"AdapterHub's option original_ln_before=True lets an adapter read the sum behind {hidden[0].ours}, which "
            "no module of this model gives."
        )
    sums = {place.ours: place.behind for place in places}
    normed = pfeiffer and all(place.norm for place in places)
    return {"placement": "stream", "norms" if normed else "outputs": sums}


def _rule(options: BottleneckOptions, tensors: Tensors) -> Tensor | None:
    """Return the matrices `[n, n, n]` that the layers of a Compacter share."""
    if not options.phm_layer:
        return None
    n = options.phm_dim
    if options.factorized_phm_rule:
        left = tensors.take("shared_parameters.phm_rule_left", (n, n, 1))
        return left @ tensors.take("shared_parameters.phm_rule_right", (n, 1, n))
    if not tensors.has("shared_parameters.phm_rule"):
        raise AdapterError(
            f"{tensors.source} lacks the matrices that a Compacter's layers share (shared_parameters…phm_rule), which "
            "AdapterHub does not save of a T5ForConditionalGeneration: save the adapter of a T5AdapterModel."
        )
    return tensors.take("shared_parameters.phm_rule", (n, n, n))


def _network(
    options: BottleneckOptions, tensors: Tensors, place: AdapterPlace, width: int, size: int
) -> dict[str, Tensor]:
    """Return the tensors of one place's adapter."""
    theirs, ours = f"{place.theirs}.adapters", f"{ROOT}{place.ours}.bottleneck"
    kept: dict[str, Tensor] = {}
    for side, module, inputs, outputs in (
        ("down", f"{theirs}.adapter_down.0", width, size),
        ("up", f"{theirs}.adapter_up", size, width),
    ):
        if options.phm_layer:
            n = options.phm_dim
            if inputs % n or outputs % n:
                raise AdapterError(f"AdapterHub's option phm_dim={n} divides not both {inputs} and {outputs} features.")
            kept[f"{ours}.{side}.left"] = tensors.take(f"{module}.W_left", (n, inputs // n, 1)).squeeze(2)
            kept[f"{ours}.{side}.right"] = tensors.take(f"{module}.W_right", (n, 1, outputs // n)).squeeze(1)
            if options.phm_bias:
                kept[f"{ours}.{side}.bias"] = tensors.take(f"{module}.b", (outputs,))
        else:
            kept[f"{ours}.{side}.weight"] = tensors.take(f"{module}.weight", (outputs, inputs))
            kept[f"{ours}.{side}.bias"] = tensors.take(f"{module}.bias", (outputs,))
    if isinstance(options.scaling, str):
        kept[f"{ours}.scale"] = tensors.take(f"{theirs}.scaling", (width if options.scaling == "channel" else 1,))
    if options.use_gating:
        kept[f"{ours}.gate.weight"] = tensors.take(f"{theirs}.gate.weight", (1, width))
        kept[f"{ours}.gate.bias"] = tensors.take(f"{theirs}.gate.bias", (1,))
    return kept
