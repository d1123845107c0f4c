"""AdapterHub's prefix tuning as this package's prefixes in attention; a reparametrisation is computed out."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from lightning_peft.adapterhub.options import PrefixOptions
from lightning_peft.adapterhub.part import ROOT, Part
from lightning_peft.adapterhub.places import Place, Places
from lightning_peft.adapterhub.tensors import Tensors
from lightning_peft.backbone.structure import matrix_shape
from lightning_peft.stack.adapter_files.folder import AdapterError

_ASKED = {"encoder_prefix": "encoder_prefix", "cross_prefix": "cross_prefix"}  # other places always have prefixes


def prefixes(options: PrefixOptions, tensors: Tensors, places: Places, config: Any) -> list[Part]:
    """Return the prefixes of all attentions as one adapter.

    Args:
        options: AdapterHub's.
        tensors: the adapter's tensors.
        places: the model's places.
        config: the model's configuration, which says how many heads keys and values have.

    Raises:
        AdapterError: the activation is unknown, or a tensor is missing or of another shape.
    """
    from lightning_peft.tuners.prefix import PrefixConfig

    if places.architecture.relative and options.leave_out:
        raise AdapterError(
            f"AdapterHub's option leave_out={options.leave_out} of a prefix takes the biases of relative positions "
            "from the layers that are left out, which no adapter of this package can."
        )
    kept, targets = {}, []
    for shared, members in places.prefixes(options.leave_out).items():
        if shared in _ASKED and not getattr(options, _ASKED[shared]):
            continue
        width = _width(config)
        states = _states(options, tensors, shared, 2 * len(members) * width)
        split = states.unflatten(1, (2 * len(members), width))
        for i, place in enumerate(members):
            ours = f"{ROOT}{place.ours}"
            kept[f"{ours}.prefix_key"], kept[f"{ours}.prefix_value"] = split[:, 2 * i], split[:, 2 * i + 1]
            if options.use_gating:
                kept |= _gate(tensors, place, matrix_shape(places.modules[place.ours])[0])
            targets.append(place.ours)
    if not targets:
        raise AdapterError(f"{tensors.source} has a prefix without a place: its options leave out all.")
    prefix = PrefixConfig(
        target_modules=targets,
        length=options.prefix_length,
        init="paper",
        gate=options.use_gating,
        count_positions=places.architecture.relative,
    )
    return [Part("prefix", prefix, kept)]


def _width(config: Any) -> int:
    """Return the number of features of all heads' keys, as AdapterHub counts them."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "d_kv", None) or config.hidden_size // config.num_attention_heads
    return int(heads * size)


def _states(options: PrefixOptions, tensors: Tensors, shared: str, features: int) -> Tensor:
    """Return the keys and values of all layers `[length, features]`."""
    module = f"prefix_tuning.prefix_tunings.{shared}"
    length, inner = options.prefix_length, options.bottleneck_size
    if options.flat:
        return _taken(tensors, f"{module}.control_trans", (length * features,)).view(length, features)
    tokens = _taken(tensors, f"{module}.wte.weight", None)
    width = tokens.shape[-1]
    if tuple(tokens.shape) != (length, width):
        raise AdapterError(f"{tensors.source}: {module}.wte.weight is not as long as the prefix, {length} tokens.")
    down = _taken(tensors, f"{module}.control_trans.0.weight", (inner, width))
    hidden = linear(tokens, down, _taken(tensors, f"{module}.control_trans.0.bias", (inner,)))
    up = _taken(tensors, f"{module}.control_trans.2.weight", (features, inner))
    return linear(
        _activation(options.non_linearity)(hidden), up, _taken(tensors, f"{module}.control_trans.2.bias", (features,))
    )


def _taken(tensors: Tensors, name: str, shape: tuple[int, ...] | None) -> Tensor:
    """Take a tensor, and its copies: AdapterHub saves what all layers share once more with each of them."""
    tensor = tensors.take(name, shape)
    tensors.take_copies(name.removeprefix("prefix_tuning."), tensor)
    return tensor


def _activation(name: str) -> Any:
    from transformers.activations import ACT2FN, get_activation

    if name.lower() not in ACT2FN:
        raise AdapterError(f"AdapterHub's option non_linearity={name!r} is none of transformers' activations.")
    return get_activation(name.lower())


def _gate(tensors: Tensors, place: Place, width: int) -> dict[str, Tensor]:
    theirs, ours = f"{place.theirs}.prefix_tuning.prefix_gates", f"{ROOT}{place.ours}.prefix_gate"
    return {
        f"{ours}.weight": tensors.take(f"{theirs}.weight", (1, width)),
        f"{ours}.bias": tensors.take(f"{theirs}.bias", (1,)),
    }
