"""A cheap identity of a base model, so that an adapter is never put on another base unnoticed."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 8  # values read from each sampled tensor
_TENSORS = 4  # tensors sampled, spread over the model
# an adapter fits the same base in another precision: bfloat16 keeps 8 bits, so values agree to 2**-8 of themselves
_RELATIVE = 2.0**-7


def fingerprint(backbone: nn.Module) -> dict[str, Any]:
    """Describe the base weights of `backbone`, adapters left out, as JSON-able values.

    Returns:
        `{"names": sha256 of all parameter names and shapes, "model_type": str | None,
        "samples": {parameter name: [values]}}`. Quantised weights are named but not sampled.
    """
    parameters = _base_parameters(backbone)
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(f"{name} {tuple(_shape(parameter))}\n".encode())
    floats = {n: p for n, p in parameters.items() if p.is_floating_point() and p.numel() and p.device.type != "meta"}
    names = list(floats)
    chosen = sorted(
        {names[round(i * (len(names) - 1) / max(1, _TENSORS - 1))] for i in range(_TENSORS)} if names else ()
    )
    return {
        "names": digest.hexdigest(),
        "model_type": getattr(getattr(backbone, "config", None), "model_type", None),
        "samples": {name: _sample(floats[name]) for name in chosen},
    }


def mismatch(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Say in a few words how two fingerprints differ, or None where they fit (precision may differ)."""
    if expected["names"] != found["names"]:
        kinds = f"{expected.get('model_type')} and {found.get('model_type')}"
        return f"their parameters have other names or shapes (model types {kinds})"
    for name, values in expected["samples"].items():
        other = found["samples"].get(name)
        if other is None:  # quantised, or on the meta device: names and shapes are all that can be compared
            continue
        a, b = torch.tensor(values), torch.tensor(other)
        if not torch.allclose(a, b, rtol=_RELATIVE, atol=_RELATIVE * float(a.abs().max())):
            return f"{name} holds other values"
    return None


def _base_parameters(backbone: nn.Module) -> dict[str, Tensor]:
    """Parameters that are not an adapter's, under the names they have in the bare model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapter: set[int] = set()
    for module in backbone.modules():
        if isinstance(module, BaseTunerLayer):
            base = {id(p) for p in module.get_base_layer().parameters()}
            adapter |= {id(p) for p in module.parameters()} - base
    named = {n.replace(".base_layer", ""): p for n, p in backbone.named_parameters() if id(p) not in adapter}
    return dict(sorted(named.items()))


def _shape(parameter: Tensor) -> torch.Size:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs 4-bit weights into bytes
    return parameter.shape if state is None else state.shape


def _sample(parameter: Tensor) -> list[float]:
    flat = parameter.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel())).long()
    return [float(v) for v in flat[index.to(flat.device)].float().cpu()]
