"""A cheap identity of a base model, so that an adapter is never put on another base unnoticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.modules import bare_name, base_modules, eager_key, flat_key
from lightning_peft.backbone.quantization import was_conv1d

_SAMPLES = 8  # values read from each tensor
_SUBNORMAL = 1e-7  # values this small are rounded to a fixed grid in float16


def fingerprint(backbone: nn.Module) -> dict[str, Any]:
    """Describe the base weights of `backbone`, adapters left out, as JSON-able values.

    Returns:
        `{"names": sha256 of all parameter names and shapes, "model_type": str | None,
        "samples": {name: {"dtype": str, "values": [...]}}}`, with a few values of every parameter and every saved
        buffer of floating point. Quantised weights are named but not sampled.
    """
    parameters = _base_parameters(backbone)
    turned = {id(module.weight) for module in backbone.modules() if was_conv1d(module)}
    digest = hashlib.sha256()
    for name in sorted(parameters, key=flat_key):
        parameter = parameters[name]
        shape = tuple(_shape(parameter))
        digest.update(f"{flat_key(name)} {shape[::-1] if id(parameter) in turned else shape}\n".encode())
    return {
        "names": digest.hexdigest(),
        "model_type": getattr(getattr(backbone, "config", None), "model_type", None),
        "samples": {n: _sample(t) for n, t in _sampled(backbone, parameters).items() if t.device.type != "meta"},
    }


def blank_samples(backbone: nn.Module) -> dict[str, Any]:
    """Return the samples of a fingerprint with no values read, to see how much they are."""
    return {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "values": [0.1] * min(_SAMPLES, tensor.numel())}
        for name, tensor in _sampled(backbone, _base_parameters(backbone)).items()
    }


def _sampled(backbone: nn.Module, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of which a fingerprint holds values."""
    tensors = parameters | _saved_buffers(backbone)
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}


def mismatch(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Say in a few words how two fingerprints differ, or None where they fit: the precision may differ.

    What only one of the two has sampled (a quantised weight, or what is on the meta device) is not compared.
    """
    if expected["names"] != found["names"]:
        kinds = f"{expected.get('model_type')} and {found.get('model_type')}"
        return f"their parameters have other names or shapes (model types {kinds})"
    both = [name for name in expected["samples"] if name in found["samples"]]
    if not (differing := [name for name in both if not _alike(expected["samples"][name], found["samples"][name])]):
        return None
    named = ", ".join(differing[:3]) + (", …" if len(differing) > 3 else "")
    return f"{len(differing)} of {len(both)} tensors hold other values: {named}"


def without(identity: dict[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """Return a fingerprint without the values in these modules, which an adapter replaces whole."""
    inside = tuple(f".{module}." for module in modules)
    samples = identity.get("samples", {})
    # peft, too, finds a module by the end of its name
    outside = {name: sample for name, sample in samples.items() if not any(end in f".{name}" for end in inside)}
    return identity | {"samples": outside} if identity else identity


def _alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return whether values agree to the coarser of the two precisions, exactly where both are the same."""
    if a == b:
        return True
    coarse = max(torch.finfo(getattr(torch, sample["dtype"])).eps for sample in (a, b))
    relative = coarse if a["dtype"] != b["dtype"] else 0.0
    if len(a["values"]) != len(b["values"]):
        return False
    left, right = torch.tensor(a["values"]), torch.tensor(b["values"])
    return left.shape == right.shape and torch.allclose(left, right, rtol=relative, atol=_SUBNORMAL)


def _base_parameters(backbone: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are not an adapter's, under their names in the bare model, each once."""
    base_ids = {id(p) for _, module in base_modules(backbone) for p in module.parameters(recurse=False)}
    named = {eager_key(bare_name(backbone, n)): p for n, p in backbone.named_parameters() if id(p) in base_ids}
    return dict(sorted(named.items()))


def _saved_buffers(backbone: nn.Module) -> dict[str, Tensor]:
    """Return the buffers in the state, such as BatchNorm's statistics, by the names they have without adapters."""
    return {
        eager_key(f"{name}.{key}".lstrip(".")): buffer
        for name, module in base_modules(backbone)
        for key, buffer in module.named_buffers(recurse=False)
        if key not in module._non_persistent_buffers_set
    }


def _shape(parameter: Tensor) -> torch.Size:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs 4-bit weights into bytes
    return parameter.shape if state is None else state.shape


def _sample(parameter: Tensor) -> dict[str, Any]:
    flat = parameter.detach().reshape(-1)
    values = flat[_places(flat.numel()).to(flat.device)].float().tolist()
    return {"dtype": str(parameter.dtype).removeprefix("torch."), "values": values}


@cache
def _places(size: int) -> Tensor:
    """Return where a tensor of this size is sampled."""
    with torch.device("cpu"):
        return torch.linspace(0, size - 1, min(_SAMPLES, size), dtype=torch.float64).long()
