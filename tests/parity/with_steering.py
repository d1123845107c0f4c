"""CAA, RepE and head offsets beside steering libraries; made by `benchmarks/parity/steering_libraries.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from parity.comparison import Comparison, Difference, relative
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_peft import edit
from lightning_peft.callbacks import CAA, RepE
from lightning_peft.editing import capture_texts, head_offsets_config, head_sites
from lightning_peft.editing.directions import principal
from lightning_peft.editing.layers import layer_offsets_config, layer_sites

_FILES = Path(__file__).parent / "fixtures/steering"
_TYPES = {"LLaMA": "llama", "GPT-2": "gpt2"}
_VECTORS, _REPENG, _PYVENE = "steering-vectors 0.12.2", "repeng 0.4.0", "pyvene 0.1.8"
_CENTRED = "repeng takes the mean difference out before its component, RepE does not"

Compute = Callable[[str], Difference]


def comparisons() -> list[Comparison]:
    kinds: list[tuple[str, str, Compute, str]] = [
        ("`CAA`, vectors", f"{_VECTORS} `mean_aggregator`", _caa_vectors, ""),
        ("`CAA(positions='all[2:]')`, logits", f"{_VECTORS} `apply(min_token_index=2)`", _caa_logits, ""),
        ("`RepE`, directions", f"{_VECTORS} `pca_aggregator`", partial(_repe, "steering_vectors.pca"), ""),
        ("`RepE`, directions", f"{_REPENG} `pca_center`", partial(_repe, "repeng.pca_center"), ""),
        ("`principal` of differences", f"{_REPENG} `pca_diff`", _centred, _CENTRED),
        ("layer offsets at all positions, logits", f"{_REPENG} `ControlModel`", _layer_offsets, ""),
        ("head offsets at all positions, logits", f"{_PYVENE} at projection inputs", _head_offsets, ""),
    ]
    return [
        Comparison(method, peer, architecture, partial(compute, architecture), outputs=5e-6, note=note)
        for method, peer, compute, note in kinds
        for architecture in _TYPES
    ]


@cache
def _facts() -> dict[str, Any]:
    return json.loads((_FILES / "facts.json").read_text())


@cache
def _numbers(architecture: str) -> dict[str, Tensor]:
    return load_file(_FILES / f"{architecture}.safetensors") | load_file(_FILES / "inputs.safetensors")


def _model(architecture: str) -> Any:
    numbers = _numbers(architecture)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(_TYPES[architecture], **_facts()["configs"][architecture])
    )
    weights = {name.removeprefix("model."): value for name, value in numbers.items() if name.startswith("model.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.eval()
    with torch.no_grad():
        assert relative(model(numbers["input_ids"]).logits, numbers["logits"]) < 1e-6
    return model


def _edited(architecture: str, method: Any) -> tuple[Any, Any]:
    """Compute an edit from the pairs; return the model with it on, and the method, whose `edit_` it is."""
    model, pairs = _model(architecture), _numbers(architecture)["pairs"]
    texts = [" ".join(map(str, text)) for text in pairs.flatten(0, 1).tolist()]
    label, group = [1, 0] * len(pairs), torch.arange(len(pairs)).repeat_interleave(2)
    edit(model, _tokens, texts, label, group, method)
    return model, method


def _tokens(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
    return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def _caa_vectors(architecture: str) -> Difference:
    _, caa = _edited(architecture, CAA(layers=[0, 1, 2]))
    return Difference(relative(caa.edit_.vectors, _numbers(architecture)["steering_vectors.mean"]))


def _caa_logits(architecture: str) -> Difference:
    facts, numbers = _facts(), _numbers(architecture)
    positions = f"all[{facts['first_token']}:]"
    model, _ = _edited(architecture, CAA([0, 1, 2], facts["multiplier"], positions))
    with torch.no_grad():
        return Difference(relative(model(numbers["input_ids"]).logits, numbers["steering_vectors.logits"]))


def _repe(name: str, architecture: str) -> Difference:
    theirs = _numbers(architecture)[name]
    _, repe = _edited(architecture, RepE(layers=list(range(len(theirs)))))
    vectors = repe.edit_.vectors
    return Difference(relative(vectors / vectors.norm(dim=-1, keepdim=True), theirs))


def _centred(architecture: str) -> Difference:
    model, numbers = _model(architecture), _numbers(architecture)
    sites = layer_sites(model)[:2]
    states = capture_texts(model, sites, numbers["pairs"].flatten(0, 1).tolist(), "last").values
    differences, theirs = states[::2] - states[1::2], numbers["repeng.pca_diff"]
    ours = principal(differences, torch.tensor([1, 0] * (len(differences) // 2)))
    return Difference(relative(ours * (ours * theirs).sum(-1, keepdim=True).sign(), theirs))  # up to its sign


def _layer_offsets(architecture: str) -> Difference:
    model, numbers = _model(architecture), _numbers(architecture)
    config = layer_offsets_config(layer_sites(model)[:2], _facts()["multiplier"], "all")
    return _logits(model, config, numbers["repeng.pca_center"], numbers["repeng.logits"])


def _head_offsets(architecture: str) -> Difference:
    model, numbers = _model(architecture), _numbers(architecture)
    config = head_offsets_config(head_sites(model), alpha=1.0, positions="all")
    return _logits(model, config, numbers["shift"], numbers["pyvene.logits"])


def _logits(model: Any, config: PeftConfig, vectors: Tensor, theirs: Tensor) -> Difference:
    """Put vectors, one for each layer, into an adapter, and compare the logits with it on."""
    wrapped = get_peft_model(model, config).eval()
    offsets = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter, vector in zip(offsets, vectors, strict=True):
            parameter.copy_(vector.view_as(parameter))
        return Difference(relative(wrapped(_numbers("LLaMA")["input_ids"]).logits, theirs))
