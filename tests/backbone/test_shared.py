"""A weight that several modules have changes for the merged module alone, and is shared again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from edits import close
from peft import IA3Config, LoraConfig
from tiny_models import VOCABULARY
from torch import Tensor, nn

from lightning_peft.stack.stack import stack_of
from lightning_peft.tuners.bottleneck import BottleneckConfig
from lightning_peft.tuners.ssb import SSBConfig
from lightning_peft.tuners.weight_deltas import WeightDeltasConfig

pytestmark = pytest.mark.filterwarnings("ignore")


class TwoNames(nn.Module):
    """One layer under two names, and one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = self.k_proj = nn.Linear(8, 8)
        self.v_proj, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.v_proj.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(torch.tanh(self.q_proj(x)) * torch.tanh(self.k_proj(x)) + self.v_proj(x))


def language(name: str, **options: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, f"{name.split('For')[0]}Config")(**options)).eval()


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "two names": TwoNames,
    "LLaMA, tied": lambda: language("LlamaForCausalLM", vocab_size=VOCABULARY, tie_word_embeddings=True, **SMALL),
    "ALBERT": lambda: language("AlbertForMaskedLM", vocab_size=VOCABULARY, embedding_size=8, **SMALL),
    "T5": lambda: language("T5ForConditionalGeneration", **T5),
}
REPEATED = {"layer_replication": [[0, 2], [1, 3]]}
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "one name of a layer": ("two names", lambda: lora("q_proj")),
    "one of two layers": ("two names", lambda: lora("v_proj")),
    "both layers": ("two names", lambda: lora("tied", "v_proj")),
    "IA3": ("two names", lambda: IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=["v_proj"])),
    "SSB": ("two names", lambda: SSBConfig(target_modules=["q_proj", "tied"])),
    "bottleneck": (
        "two names",
        lambda: BottleneckConfig(size=2, activation="linear", biases=False, target_modules=["q_proj", "tied"]),
    ),
    "weight deltas": ("two names", lambda: WeightDeltasConfig(target_parameters=["v_proj.weight", "q_proj.weight"])),
    "output embedding": ("LLaMA, tied", lambda: lora("lm_head")),
    "input embedding": ("LLaMA, tied", lambda: lora("embed_tokens")),
    "both embeddings": ("LLaMA, tied", lambda: lora("embed_tokens", "lm_head")),
    "tied by peft": ("LLaMA, tied", lambda: lora("embed_tokens", ensure_weight_tying=True)),
    "DoRA": ("LLaMA, tied", lambda: lora("embed_tokens", "lm_head", use_dora=True)),
    "repeated layers": ("LLaMA, tied", lambda: lora("q_proj", **REPEATED)),
    "ALBERT's layer": ("ALBERT", lambda: lora("query")),
    "ALBERT's embedding": ("ALBERT", lambda: lora("word_embeddings")),
    "T5's output": ("T5", lambda: lora("lm_head", "q")),
    "T5's inputs": ("T5", lambda: lora("encoder.embed_tokens")),
}


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), **options)


def outputs(model: Any) -> Tensor:
    if isinstance(model, TwoNames):
        return model(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)))
    tokens = torch.arange(4, 12)[None]
    given = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    return model(input_ids=tokens, **given).logits


def shared(model: nn.Module) -> set[tuple[str, ...]]:
    """The groups of names that stand for one parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {tuple(group) for group in names.values() if len(group) > 1}


@pytest.mark.parametrize("case", CASES)
def test_a_merge_of_shared_weights_is_exact_and_leaves_them_shared(case: str) -> None:
    kind, config = CASES[case]
    model = MODELS[kind]()
    stack = stack_of(model)
    stack.add(config())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = outputs(model.eval())
        for value in stack.tensors(stack["default"]).values():
            value.add_(torch.randn(value.shape, generator=generator))
        adapted, groups = outputs(model), shared(model)
        assert groups and not close(adapted, before, 1e-3)
        stack.merge()
        assert close(outputs(model), adapted)
        stack.unmerge()
        assert close(outputs(model), adapted) and shared(model) == groups


@pytest.mark.parametrize("kind", ["two names", "LLaMA, tied"])
def test_after_the_adapter_is_gone_the_modules_are_those_that_were_shared(kind: str) -> None:
    model = MODELS[kind]()
    before, groups = outputs(model), shared(model)
    stack_of(model).add(lora(*(["q_proj", "tied"] if kind == "two names" else ["q_proj", "lm_head"])))
    stack_of(model).merge()
    stack_of(model).remove("default")
    assert shared(model) == groups and close(outputs(model), before)
    if isinstance(model, TwoNames):
        assert model.q_proj is model.k_proj and model.tied.weight is model.v_proj.weight


def test_repeated_layers_are_another_base_so_the_adapter_cannot_be_switched_off() -> None:
    model = MODELS["LLaMA, tied"]()
    stack_of(model).add(lora("q_proj", **REPEATED))
    with pytest.raises(ValueError, match=r"changing the base itself \(layer_replication=\[\[0, 2\], \[1, 3\]\]\)"):
        stack_of(model).remove("default")


def test_a_shared_weight_with_deltas_takes_no_other_adapter_in() -> None:
    model = MODELS["two names"]()
    stack = stack_of(model)
    stack.add(WeightDeltasConfig(target_parameters=["v_proj.weight"]), "deltas")
    stack.add(lora("tied", init_lora_weights=False), "lora")
    before = outputs(model)
    with pytest.raises(ValueError, match="cannot be merged into tied"):
        stack.merge()
    assert close(outputs(model), before)
