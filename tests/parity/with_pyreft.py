"""LoReFT, DiReFT and NoReFT beside the authors' pyreft; numbers made by `benchmarks/parity/pyreft_library.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from parity.comparison import Comparison, Difference, relative
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import answering
from lightning_peft.callbacks import DiReFT, LoReFT, NoReFT
from lightning_peft.tuners.reft import ReftLayer

_FILES = Path(__file__).parent / "fixtures/pyreft"
_PYREFT, _POSITIONS = "pyreft 0.1.0", "prompt[0:3]+prompt[-3:]"
_ROWS = "gradients of W and b; R is orthonormal by another map there"
_TENSORS = ("rows", "source", "bias")
_CASES: dict[str, tuple[str, str, type[LoReFT], Mapping[str, Any], str]] = {
    "loreft": ("`LoReFT`", "`LoreftIntervention`", LoReFT, {}, _ROWS),
    "loreft_apart": (
        "`LoReFT(share_weights=False)`",
        "`LoreftIntervention`, prefix and suffix apart",
        LoReFT,
        {"share_weights": False},
        _ROWS,
    ),
    "noreft": ("`NoReFT`", "`NoreftIntervention`", NoReFT, {}, ""),
    "direft": (
        "`DiReFT(orthogonal=True, act_fn='relu')`",
        "`DireftIntervention(act_fn='relu')`",
        DiReFT,
        {"orthogonal": True, "act_fn": "relu"},
        _ROWS,
    ),
    "nodireft_apart": (
        "`DiReFT(share_weights=False)`",
        "`NodireftIntervention`, prefix and suffix apart",
        DiReFT,
        {"share_weights": False},
        "",
    ),
}


def comparisons() -> list[Comparison]:
    return [
        Comparison(method, f"{_PYREFT} {peer}", "llama", partial(_difference, name), outputs=3e-6, note=note)
        for name, (method, peer, _, _, note) in _CASES.items()
    ]


@cache
def numbers() -> dict[str, Tensor]:
    """Return what pyreft computed."""
    return load_file(_FILES / "numbers.safetensors")


@cache
def facts() -> dict[str, Any]:
    """Return what it was computed with."""
    return json.loads((_FILES / "facts.json").read_text())


def adapted(name: str) -> Any:
    """Return the LLaMA with pyreft's tensors of a case in an adapter of ours."""
    _, _, method, options, _ = _CASES[name]
    model: Any = _base()
    callback = method(r=facts()["r"], layers=facts()["layers"], positions=_POSITIONS, **options)
    callback.apply(_Holder(model))
    ours = [module for module in model.modules() if isinstance(module, ReftLayer)]
    with torch.no_grad():
        for number, layer in enumerate(ours):
            for key in _TENSORS:
                tensor = getattr(layer, f"reft_{key}")[callback.name]
                for unit, part in enumerate(tensor):  # pyreft counts all prefixes, then all suffixes
                    part.copy_(numbers()[f"{name}.{key}.{number + unit * len(ours)}"])
    return model


def start() -> Tensor:
    """Return the position ids of the last prompt tokens."""
    return torch.tensor(facts()["prompts"]) - 1


class _Holder(torch.nn.Module):
    def __init__(self, backbone: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = backbone


def _base() -> Any:
    model = LlamaForCausalLM(LlamaConfig(**facts()["config"])).eval()
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            count = torch.arange(1, parameter.numel() + 1, dtype=torch.float64)
            values = torch.sin(count * (1 + 0.37 * number)).float().view_as(parameter)
            parameter.copy_(0.35 * values if parameter.dim() > 1 else 1 + 0.1 * values)
        assert relative(model(numbers()["input_ids"]).logits, numbers()["base"]) < 1e-6
    return model


def _difference(name: str) -> Difference:
    model, ids = adapted(name), numbers()["input_ids"]
    with answering(model, start=start()):
        logits = model(ids).logits
    answers = ids.masked_fill(torch.arange(ids.shape[1]) <= start()[:, None], -100)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), answers[:, 1:].flatten()).backward()
    layers, gradients = [module for module in model.modules() if isinstance(module, ReftLayer)], {}
    for number, layer in enumerate(layers):
        for key in _TENSORS:
            (parameter,) = getattr(layer, f"reft_{key}").values()
            for unit, gradient in enumerate(parameter.grad):
                gradients[f"{name}.gradient.{key}.{number + unit * len(layers)}"] = gradient
    theirs = {key: value for key, value in numbers().items() if key.startswith(f"{name}.gradient.")}
    largest = max(float(value.abs().max()) for value in theirs.values())
    furthest = max(float((gradients[key] - value).abs().max()) for key, value in theirs.items()) / largest
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    stored = [value for key, value in numbers().items() if key.startswith(tuple(f"{name}.{k}." for k in _TENSORS))]
    return Difference(
        relative(logits.detach(), numbers()[f"{name}.logits"]), furthest, (trained, sum(t.numel() for t in stored))
    )
