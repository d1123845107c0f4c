"""Strata: each depth has its own methods, and the frozen ones stay bit-equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor
from tuning import QUIET, Classifier, Language, fit, one_sentence, weights

from lightning_peft import adapters, load_adapter, save_adapter
from lightning_peft.backbone.modules import is_linear
from lightning_peft.callbacks import BitFit, FullFineTuning, HeadOffsets, LoRA, Strata

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


def trained(module: Any) -> set[str]:
    """Names of the modules that some adapter is on."""
    stack = adapters(module)
    lora = {n.split(".lora_")[0] for n in weights(stack.backbone) if ".lora_A." in n}
    return lora | {
        n.split(".weight_deltas.")[0].replace(".base_layer", "")
        for n in weights(stack.backbone)
        if ".weight_deltas." in n
    }


def parameters(module: Any, name: str) -> set[str]:
    return set(adapters(module)[name].config.target_parameters)


def test_spafit_is_frozen_then_biases_then_lora_and_the_other_biases() -> None:
    module = Language("opt")
    Strata(boundaries=(1, 2), r=2).apply(module)
    stack = adapters(module)
    biases = {n for n, _ in tiny("opt").named_parameters() if n.endswith("bias")}
    assert [part.name for part in stack.parts] == ["strata-2-bitfit", "strata-3-lora", "strata-3-bitfit"]
    assert parameters(module, "strata-2-bitfit") == {n for n in biases if ".layers.1." in n}
    attention = {f"model.decoder.layers.2.self_attn.{m}_proj" for m in ("q", "k", "v", "out")}
    assert set(stack["strata-3-lora"].config.target_modules) == attention
    assert parameters(module, "strata-3-bitfit") == {
        n for n in biases if ".layers.2." in n and n.removesuffix(".bias") not in attention
    }
    assert not any(".layers.0." in name for name in trained(module))


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2", "bert"])
def test_the_count_is_the_sum_over_the_strata(kind: str) -> None:
    module, r = Language(kind), 2
    Strata(boundaries=(1, 2), r=r, add_missing=True).apply(module)
    model = tiny(kind)

    def biases(block: int, attention: bool) -> int:
        named = {n: m for n, m in model.named_modules() if f".{block}." in n}
        inside = ("attn", "attention")
        linear = sum(
            m.weight.shape[1 if type(m).__name__ == "Conv1D" else 0]
            for n, m in named.items()
            if is_linear(m) and (attention or not any(part in n for part in inside))
        )
        norms = sum(m.bias.numel() for m in named.values() if type(m).__name__ == "LayerNorm")
        return linear + norms

    lora = sum(
        r * sum(m.weight.shape)
        for n, m in model.named_modules()
        if ".2." in n and is_linear(m) and any(part in n for part in ("attn", "attention"))
    )
    count = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert count == biases(1, True) + biases(2, False) + lora


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_frozen_stratum_is_bit_equal_and_so_is_what_it_computes(kind: str, tmp_path: Path, tokens: Tensor) -> None:
    module = Language(kind)
    before = weights(module)
    states = module.model(input_ids=tokens, output_hidden_states=True).hidden_states
    fit(module, Strata(boundaries=(1, 2), r=2, add_missing=True))
    module.eval()
    output = module.model(input_ids=tokens, output_hidden_states=True)
    assert torch.equal(output.hidden_states[1], states[1]) and not torch.equal(output.hidden_states[2], states[2])
    now = {name.replace(".base_layer", ""): value for name, value in weights(module).items()}
    assert all(torch.equal(now[name], value) for name, value in before.items())
    stack = adapters(module)
    with stack.disabled():
        assert torch.equal(module.model(input_ids=tokens).logits, tiny(kind)(input_ids=tokens).logits)
    save_adapter(module, tmp_path)
    again = tiny(kind)
    load_adapter(again, tmp_path)
    assert torch.equal(again(input_ids=tokens).logits, output.logits)


def test_by_default_the_blocks_are_divided_in_thirds() -> None:
    module = Language("opt")
    Strata(r=2).apply(module)
    assert {int(n.split(".layers.")[1].split(".")[0]) for n in parameters(module, "strata-2-bitfit")} == {1}


def test_any_methods_with_layers_may_be_given() -> None:
    module = Classifier()
    methods = [[LoRA(r=1)], [FullFineTuning()]]
    fit(module, Strata(boundaries=[1], methods=methods, backbone="net"))
    assert trained(module) == {"blocks.0.linear"} | {f"blocks.{i}.{m}" for i in (1, 2) for m in ("linear", "norm")}
    assert methods[0][0].layers is None  # what is given is not changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boundaries": (2, 1)}, "boundaries must not fall or be negative, got [2, 1]."),
        ({"boundaries": (1,)}, "1 boundaries make 2 strata, but 3 have methods."),
        ({"boundaries": (1, 7)}, "OPTForCausalLM has 3 blocks, too few for strata that begin with [1, 7]."),
        ({"methods": [[HeadOffsets()]]}, "HeadOffsets cannot be restricted to layers, and so not to a stratum."),
        (
            {"methods": [[BitFit(), BitFit()]]},
            "Two methods of one stratum have the same name: give one of them another.",
        ),
    ],
)
def test_what_makes_no_strata_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        fit(Language("opt"), Strata(**options))
    assert message in str(error.value) and one_sentence(str(error.value))
