"""AdapterHub's LoReFT, NoReFT and DiReFT as this package's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_peft.adapterhub.options import ReftOptions
from lightning_peft.adapterhub.part import ROOT, Part
from lightning_peft.adapterhub.places import Places
from lightning_peft.adapterhub.tensors import Tensors
from lightning_peft.backbone.structure import width
from lightning_peft.positions.decoder import decoder_of
from lightning_peft.stack.adapter_files.folder import AdapterError

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "swish", "silu": "swish", "tanh": "tanh", "linear": "linear"}


def hidden_states(options: ReftOptions, tensors: Tensors, places: Places, model: nn.Module) -> list[Part]:
    """Return the adapter.

    Raises:
        AdapterError: an option has no equal here, or a tensor is missing or of another shape.
    """
    from lightning_peft.tuners.reft import ReftConfig

    _check(options, tensors, model)
    selections = {0: f"all[0:{options.prefix_positions}]", 1: f"prompt[-{options.suffix_positions}:]"}
    acting = [unit for unit, n in enumerate((options.prefix_positions, options.suffix_positions)) if n]
    size, kept, names = width(model), {}, []
    for place in places.blocks():
        if options.layers != "all" and place.layer not in options.layers:
            continue
        theirs = f"{place.theirs}.reft_layer.refts.units"
        units = [_unit(options, tensors, f"{theirs}.{unit}", size) for unit in range(1 if options.tied_weights else 2)]
        used = units if options.tied_weights else [units[unit] for unit in acting]
        for key in ("rows", "source", "bias"):
            kept[f"{ROOT}{place.ours}.reft.reft_{key}"] = torch.stack([unit[key] for unit in used])
        names.append(place.ours)
    if not names:
        raise AdapterError(f"AdapterHub's option layers={options.layers!r} names no layer of this model.")
    config = ReftConfig(
        target_modules=names,
        width=size,
        r=options.r,
        orthogonal=options.orthogonality,
        subtract=options.subtracts,
        activation=_ACTIVATIONS[(options.non_linearity or "linear").lower()],
        dropout=float(options.dropout),
        positions="+".join(selections[unit] for unit in acting),
        share_weights=options.tied_weights,
        init_reft_weights="paper",
    )
    return [Part("reft", config, kept)]


def in_generation(options: ReftOptions, model: nn.Module) -> Iterator[str]:
    """Say what is different where texts are generated."""
    if callable(getattr(type(model), "generate", None)):
        yield (
            "AdapterHub counts positions anew in each call, so that with a key-value cache it edits each new token as "
            "a first and a last one too; here first tokens are those of the text, last ones those of the prompt."
        )


def _check(options: ReftOptions, tensors: Tensors, model: nn.Module) -> None:
    if options.subtract_projection is None and not options.orthogonality:
        raise AdapterError(
            f"{tensors.source} is AdapterHub's NoReFT or its DiReFT, which it saves alike: write subtract_projection "
            "into its config, true for NoReFT (as which AdapterHub itself loads both) or false for DiReFT."
        )
    if (options.non_linearity or "linear").lower() not in _ACTIVATIONS:
        raise AdapterError(
            f"AdapterHub's option non_linearity={options.non_linearity!r} has no equal here; these have: "
            f"{', '.join(_ACTIVATIONS)}."
        )
    for name in ("prefix_positions", "suffix_positions"):
        if getattr(options, name) < 0:
            raise AdapterError(f"AdapterHub's option {name} must not be negative, got {getattr(options, name)}.")
    if not (options.prefix_positions or options.suffix_positions):
        raise AdapterError("AdapterHub's options prefix_positions=0 and suffix_positions=0 edit no token.")
    if options.layers != "all" and isinstance(options.layers, str):
        raise AdapterError(f"AdapterHub's option layers={options.layers!r} is neither all nor a list of numbers.")
    if decoder_of(model) is not None or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise AdapterError(
            f"AdapterHub's ReFT is imported for encoders and decoders of text, not for a {type(model).__name__}, of "
            "which the tokens of a call are not known by their places."
        )


def _unit(options: ReftOptions, tensors: Tensors, name: str, size: int) -> dict[str, Tensor]:
    """Return R `[r, width]`, W and b of one of AdapterHub's units."""
    shape = (options.r, size)
    source = tensors.take(f"{name}.learned_source.weight", shape)
    bias = tensors.take(f"{name}.learned_source.bias", (options.r,))
    if not options.orthogonality:
        return {"rows": tensors.take(f"{name}.projection.weight", shape), "source": source, "bias": bias}
    parametrized = f"{name}.projection.parametrizations.weight"
    free = tensors.take(f"{parametrized}.original", shape)
    base = tensors.take(f"{parametrized}.0.base", (size, size))
    return {"rows": _parametrized(free, base), "source": source, "bias": bias}


@torch.no_grad()
def _parametrized(free: Tensor, base: Tensor) -> Tensor:
    """Return the rows that torch's orthogonal parametrization makes of its parameter and its buffer."""
    linear = nn.Linear(free.shape[1], free.shape[0], bias=False)
    nn.utils.parametrizations.orthogonal(linear)
    state = {"parametrizations.weight.original": free.float(), "parametrizations.weight.0.base": base.float()}
    linear.load_state_dict(state)
    return linear.weight.detach().clone()
