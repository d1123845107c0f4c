"""ROME and MEMIT beside their authors' code: the change of each edited matrix, of tiny models in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from parity.comparison import Comparison, Difference
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_peft.editing.facts import (
    Fact,
    KeyMoments,
    KnowledgeEdit,
    Search,
    compute_memit,
    compute_rome,
    memory_sites,
)

FIXTURES = Path(__file__).parent / "fixtures/rome"
PEER = "kmeng01/memit 80426fd"
MODELS: dict[str, tuple[Any, Any]] = {
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "gptj": (GPTJConfig, GPTJForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
SAME = "largest entry of ΔW; contexts, covariances and hyperparameters are given to both"
DEFAULT = {
    "rome": "as measured: by default the mean key and the mean norm, KL behind 'is a', one step more",
    "memit": "as measured: by default the mean norm, every context alike in a key, KL behind 'is a', one step more",
}
# how far the default is from the authors', rounded up: nothing that these models had to come out near
MEASURED = {
    ("rome", "gpt2"): 0.284,
    ("rome", "gptj"): 0.378,
    ("rome", "llama"): 0.918,
    ("memit", "gpt2"): 1.032,
    ("memit", "gptj"): 0.265,
    ("memit", "llama"): 1.63,
}


def comparisons() -> list[Comparison]:
    """Return for each method and model a row as the authors compute it, and one of the default."""
    rows = []
    for (method, kind), apart in MEASURED.items():
        name, given = method.upper(), (PEER, kind)
        equal, default = (partial(compare, method, kind, reference) for reference in (True, False))
        rows.append(Comparison(f"{name}(reference=True)", *given, equal, note=SAME))
        rows.append(Comparison(f"{name}()", *given, default, outputs=apart, note=DEFAULT[method]))
    return rows


def compare(method: str, kind: str, reference: bool) -> Difference:
    """Return the largest difference of an entry of a matrix's change, over the largest entry of theirs."""
    given, tensors = json.loads((FIXTURES / "rome.json").read_text()), load_file(FIXTURES / f"{kind}.safetensors")
    edit, apart = computed(method, kind, reference, given, tensors), []
    theirs = {name.removeprefix(f"{method}."): t for name, t in tensors.items() if name.startswith(f"{method}.")}
    assert {f"{name}.weight" for name in edit.factors} == theirs.keys()
    for name, (a, b) in edit.factors.items():
        change = theirs[f"{name}.weight"].T if kind == "gpt2" else theirs[f"{name}.weight"]  # Conv1D
        apart.append(float((b.double() @ a.double() - change).abs().max() / change.abs().max()))
    return Difference(max(apart))


def computed(
    method: str, kind: str, reference: bool, given: dict[str, Any], tensors: dict[str, Tensor]
) -> KnowledgeEdit:
    """Compute ours from what the authors' code was given."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(FIXTURES / "tokenizer.json"))
    model = loaded(kind, given["models"][kind], tensors)
    layers = [given["rome_layer"]] if method == "rome" else given["memit_layers"]
    moments = KeyMoments(memory_sites(model, layers))
    moments.sums, moments.count = torch.stack([tensors[f"covariance.{layer}"].double() for layer in layers]), 1
    settings = dict(given[method])
    weight = {"mom2_update_weight": settings.pop("mom2_update_weight")} if method == "memit" else {}
    compute: Callable[..., KnowledgeEdit] = compute_rome if method == "rome" else compute_memit
    facts = [Fact(**fact) for fact in given["facts"]]
    arguments = (model, tokenizer, facts, moments, given["prefixes"], Search(**settings))
    return compute(*arguments, shrinkage=0.0, reference=reference, **weight)


def loaded(kind: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """Return the model of the fixture, in float64."""
    config_type, model_type = MODELS[kind]
    model = model_type(config_type(**config))
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied in GPT-2
    for parent in list(model.modules()):  # LLaMA's own norms compute in float32, whatever the model's precision
        for name, child in list(parent.named_children()):
            if isinstance(child, LlamaRMSNorm):
                norm = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model.double().eval()
