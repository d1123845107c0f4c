"""BitFit: biases and nothing else, those that are missing created where asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from edits import close
from tiny_models import tiny
from torch import Tensor, nn
from tuning import QUIET, Classifier, Language, fit, one_sentence, same, weights

from lightning_peft import adapters, load_adapter, save_adapter
from lightning_peft.backbone.modules import is_linear
from lightning_peft.backbone.targets import Layers
from lightning_peft.callbacks import BitFit
from lightning_peft.testing.models import rough
from lightning_peft.tuners.weight_deltas.choice import choose_biases

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


def logits(module: Any, tokens: Tensor) -> Tensor:
    return module.model(input_ids=tokens).logits.detach()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "opt", "bert", "vit"])
def test_all_biases_are_trained_and_nothing_else(kind: str) -> None:
    module = Language(kind)
    BitFit(train_head=False).apply(module)
    assert count(module) == sum(p.numel() for n, p in tiny(kind).named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize("kind", ["llama", "t5", "gpt_neox"])
def test_missing_biases_have_one_entry_for_each_output(kind: str) -> None:
    model = tiny(kind)
    head = model.get_output_embeddings()
    module = Language(kind)
    BitFit(add_missing=True).apply(module)
    linear = [m for m in model.modules() if is_linear(m) and m is not head and m.bias is None]
    existing = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".bias"))
    assert count(module) == existing + sum(m.out_features for m in linear)


@pytest.mark.real_model
def test_smollm2_has_155520_created_biases(smollm2: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(smollm2))
    names = choose_biases(model, add_missing=True)
    widths = [model.get_submodule(name.removesuffix(".bias")).out_features for name in names]
    assert len(names) == 7 * 30 and sum(widths) == 155_520


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_untrained_it_changes_nothing_and_trained_only_biases_move(kind: str, tmp_path: Path, tokens: Tensor) -> None:
    module = Language(kind)
    before, base = weights(module), logits(module, tokens)
    callback = BitFit(add_missing=True)
    callback.apply(module)
    assert close(logits(module, tokens), base, 1e-6)
    fit(module, callback)
    stack = adapters(module)
    assert all(value.any() for value in stack.tensors(stack["bitfit"]).values())
    assert all(torch.equal(weights(module)[name], value) for name, value in before.items())
    moved = logits(module, tokens)
    assert not close(moved, base, 1e-3)
    with stack.disabled():
        assert torch.equal(logits(module, tokens), base)
    save_adapter(module, tmp_path)
    again = tiny(kind)
    load_adapter(again, tmp_path)
    assert torch.equal(again(input_ids=tokens).logits.detach(), moved)
    stack.merge()
    assert torch.equal(logits(module, tokens), moved)


def test_merged_biases_are_plain_biases_of_the_model(tmp_path: Path, tokens: Tensor) -> None:
    module = Language("opt")
    module.model = rough("opt")
    fit(module, BitFit())
    expected = logits(module, tokens)
    stack = adapters(module)
    stack.merge()
    plain = rough("opt")
    assert not same(weights(plain), {n: v for n, v in weights(module.model).items() if "weight_deltas" not in n})
    plain.load_state_dict({n: v for n, v in module.model.state_dict().items() if "weight_deltas" not in n})
    assert torch.equal(plain(input_ids=tokens).logits.detach(), expected)


@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        ("opt", ("q_proj.bias", "fc2.bias")),
        ("bert", ("query.bias", "output.dense.bias")),
        ("llama", ("q_proj.bias", "down_proj.bias")),
    ],
)
def test_query_and_second_mlp_are_two_biases_a_block(kind: str, ends: tuple[str, ...]) -> None:
    names = choose_biases(tiny(kind), "query_and_second_mlp", add_missing=True)
    assert len(names) == 2 * 3 and all(name.endswith(ends) for name in names)
    assert not any("attention.output" in name for name in names)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers": Layers(last=1)}, lambda name: ".2." in name),
        ({"within": "attention"}, lambda name: "self_attn." in name),
        ({"within": "mlp", "layers": [0]}, lambda name: ".0.fc" in name),
    ],
)
def test_layers_and_parts_restrict_it(options: dict[str, Any], expected: Any) -> None:
    names = choose_biases(tiny("opt"), **options)
    assert set(names) == {n for n, _ in tiny("opt").named_parameters() if n.endswith("bias") and expected(n)}


def test_biases_of_attention_and_recurrent_layers_are_biases() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "lstm": nn.LSTM(8, 8)})
    assert choose_biases(model) == [
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "lstm.bias_ih_l0",
        "lstm.bias_hh_l0",
    ]


def test_a_hand_written_network() -> None:
    module = Classifier()
    before = weights(module)
    fit(module, BitFit(backbone="net"))
    assert count(module) == 2 + 8 + 3 * (8 + 8) + (8 * 3 + 3)  # convolution, input, blocks, and the head
    assert {n for n, v in before.items() if not torch.equal(v, weights(module)[n])} == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {}, "LlamaForCausalLM has no such biases to train: add_missing=True gives its matrices zero ones."),
        ("gpt2", {"parts": "query_and_second_mlp"}, "has no matrix of its own for the query, but c_attn, c_proj."),
        ("gpt2", {"parts": "queries"}, 'parts must be "all" or "query_and_second_mlp", got \'queries\'.'),
    ],
)
def test_what_has_no_such_bias_is_one_sentence(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        fit(Language(kind), BitFit(**options))
    assert message in str(error.value) and one_sentence(str(error.value))
