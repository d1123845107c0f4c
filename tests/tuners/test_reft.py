"""ReFT edits what blocks give at the tokens that are named, and nothing else, by rows that stay orthonormal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layer_edits import inputs, logits_of
from peft import get_peft_model
from tiny_models import tiny
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_peft.backbone.layers import layer_sites
from lightning_peft.positions import PlainTextWarning, PositionsError, answering, policies
from lightning_peft.stack.stack import AdapterStack, stack_of
from lightning_peft.testing.models import rough
from lightning_peft.tuners.reft import ReftConfig, ReftLayer
from lightning_peft.tuners.reft.edit import orthonormal

START = torch.tensor([3, 4, 8])  # the position ids of the last prompt tokens, of 9
BOTH = "prompt[0:2]+prompt[-2:]"
# the columns that BOTH edits in each row, by the selection that has them
EDITED = ({0: 0, 1: 0, 2: 1, 3: 1}, {0: 0, 1: 0, 3: 1, 4: 1}, {0: 0, 1: 0, 7: 1, 8: 1})


def adapted(model: nn.Module, noise: float = 0.3, **options: Any) -> tuple[Any, AdapterStack]:
    """A model with ReFT of rank 3 behind every block, moved from its start by noise."""
    sites = layer_sites(model)
    torch.manual_seed(1)
    stack = stack_of(model)
    config = ReftConfig(target_modules=[site.name for site in sites], width=sites[0].width, **{"r": 3} | options)
    stack.add(config, "reft")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in parameters(model):
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model.eval(), stack


def layers(model: nn.Module) -> list[ReftLayer]:
    return [module for module in model.modules() if isinstance(module, ReftLayer)]


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for layer in layers(model) for parameter in layer.parameters()]


def by_hand(kind: str, model: nn.Module, edited: Any, f: Any, orthogonal: bool, subtract: bool) -> Tensor:
    """The logits in float64 of a model whose hidden states plain hooks edit, token by token."""
    plain: Any = rough(kind).double()
    for layer in layers(model):
        rows, source, bias = (
            t["reft"].detach().double() for t in (layer.reft_rows, layer.reft_source, layer.reft_bias)
        )
        if orthogonal:  # Gram and Schmidt, row by row
            rows = rows.clone()
            for unit in rows:
                for i in range(len(unit)):
                    for j in range(i):
                        unit[i] -= (unit[i] @ unit[j]) * unit[j]
                    unit[i] /= unit[i].norm()

        def hook(_: Any, __: Any, output: Any, rows: Tensor = rows, w: Tensor = source, b: Tensor = bias) -> Any:
            h = (output if isinstance(output, Tensor) else output[0]).clone()
            for row, columns in enumerate(edited):
                for column, selection in columns.items():
                    unit = min(selection, len(rows) - 1)
                    x = h[row, column].clone()
                    target = f(torch.stack([w[unit, i] @ x + b[unit, i] for i in range(w.shape[1])]))
                    for i in range(w.shape[1]):
                        h[row, column] += (target[i] - subtract * (rows[unit, i] @ x)) * rows[unit, i]
            return h if isinstance(output, Tensor) else (h, *output[1:])

        plain.get_submodule(layer.name).register_forward_hook(hook)
    return logits_of(plain, kind)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("orthogonal", "subtract"), [(True, True), (False, True), (False, False)])
def test_the_named_tokens_are_edited_by_the_formula(kind: str, share: bool, orthogonal: bool, subtract: bool) -> None:
    options = {"orthogonal": orthogonal, "subtract": subtract, "share_weights": share}
    model, _ = adapted(rough(kind), positions=BOTH, **options)
    with answering(model, start=START):
        ours = logits_of(model, kind)
    expected = by_hand(kind, model, EDITED, lambda x: x, orthogonal, subtract)
    assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-5
    assert not torch.allclose(expected.float(), logits_of(rough(kind), kind), atol=1e-2)


def test_every_token_and_an_activation() -> None:
    model, _ = adapted(rough("bert"), positions="all", subtract=False, orthogonal=False, activation="tanh")
    everywhere = [dict.fromkeys(range(9), 0)] * 3
    expected = by_hand("bert", model, everywhere, torch.tanh, False, False)
    assert torch.allclose(logits_of(model, "bert").double(), expected, atol=1e-4)


def test_a_token_of_two_selections_is_edited_by_the_last() -> None:
    model, _ = adapted(rough("llama"), positions="all[0:4]+all[2:6]", share_weights=False)
    expected = by_hand("llama", model, [{i: int(i >= 2) for i in range(6)}] * 3, lambda x: x, True, True)
    assert torch.allclose(logits_of(model, "llama").double(), expected, rtol=1e-3, atol=1e-4)


# -- the start, the rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("subtract", [True, False])
def test_an_untrained_adapter_is_the_base_bit_for_bit(dtype: torch.dtype, autocast: bool, subtract: bool) -> None:
    base = tiny("llama").to(dtype)
    expected = logits_of(base, "llama")
    config = ReftConfig(target_modules=["model.layers.1"], width=32, r=4, positions="all", subtract=subtract)
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=autocast)
    assert torch.equal(logits_of(model, "llama"), expected)
    (layer,) = layers(model)
    with torch.no_grad():
        layer.reft_bias["default"].add_(1)
    assert not torch.equal(logits_of(model, "llama"), expected)


def test_the_authors_start_is_an_edit_at_random() -> None:
    model, _ = adapted(tiny("llama"), noise=0.0, positions="all", init_reft_weights="paper")
    assert not torch.allclose(logits_of(model, "llama"), logits_of(tiny("llama"), "llama"), atol=1e-3)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_orthonormal_after_training_with_weight_decay(optimizer: Any, dtype: torch.dtype) -> None:
    model, _ = adapted(tiny("llama"), noise=0.0, positions="all")
    for parameter in parameters(model):
        parameter.data = parameter.data.to(dtype)
    before = [layer.rows("reft").detach().clone() for layer in layers(model)]
    steps = optimizer(parameters(model), lr=0.1, weight_decay=0.5)
    for _ in range(10):
        steps.zero_grad()
        model(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward()
        steps.step()
    for layer, first in zip(layers(model), before, strict=True):
        rows = layer.rows("reft").double()
        assert torch.allclose(rows @ rows.T, torch.eye(3).double(), atol=1e-5 if dtype == torch.float32 else 2e-2)
        assert not torch.allclose(rows, first.double(), atol=1e-2)


def test_weight_decay_alone_leaves_the_rows() -> None:
    rows = nn.Parameter(orthonormal(torch.randn(3, 8, generator=torch.Generator().manual_seed(0))))
    before = orthonormal(rows).detach()
    optimizer = torch.optim.AdamW([rows], lr=0.1, weight_decay=0.5)
    rows.grad = torch.zeros_like(rows)
    optimizer.step()
    assert not torch.allclose(rows, before) and torch.allclose(orthonormal(rows), before, atol=1e-6)


def test_the_dropout_is_on_the_change_alone() -> None:
    model, _ = adapted(tiny("llama"), positions="all[0:1]", dropout=0.5)
    (first, *_) = layers(model)
    h = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.train()
        seen = []
        handle = first.owner.register_forward_hook(lambda _, __, output: seen.append(output))
        first.owner.forward = lambda *_, **__: h  # type: ignore[method-assign]
        first._positions.before_forward(model, (), {"input_ids": torch.ones(1, 4, dtype=torch.long)})
        first.owner(h)
        handle.remove()
    dropped = seen[0][0, 0] == h[0, 0]
    assert 0 < int(dropped.sum()) < 32  # of h itself nothing is lost
    assert torch.equal(seen[0][0, 1:], h[0, 1:])


@torch.no_grad()
def test_an_adapter_put_on_a_model_in_evaluation_has_no_dropout() -> None:
    model = tiny("llama").eval()
    stack_of(model).add(ReftConfig(target_modules=["model.layers.1"], width=32, positions="all", dropout=0.5), "reft")
    for layer in layers(model):
        layer.reft_bias["reft"].fill_(1.0)
    assert torch.equal(logits_of(model, "llama"), logits_of(model, "llama"))


# -- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt"])
@torch.no_grad()
def test_prompts_are_edited_alike_with_and_without_cache_padded_and_alone_and_with_beams(kind: str) -> None:
    model, _ = adapted(tiny(kind), positions=BOTH)
    model.generation_config.eos_token_id = None
    ids = inputs(kind)["input_ids"][:2, :7].clone()
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    for beams in (1, 3):
        options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
        written = model.generate(ids, attention_mask=mask, **options)
        assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **options), written)
        alone = model.generate(ids[1:, 3:], attention_mask=mask[1:, 3:], **options)
        assert torch.equal(alone[0, 4:], written[1, 7:])
    assert not torch.equal(tiny(kind).generate(ids, attention_mask=mask, **options), written)


@torch.no_grad()
def test_steps_behind_the_prompt_compute_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted(tiny("llama"), positions=BOTH)
    calls = []
    for layer in layers(model):
        monkeypatch.setattr(layer, "rows", lambda *a, whole=layer.rows: calls.append(1) or whole(*a))
    model.generate(inputs("llama")["input_ids"], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert len(calls) == len(layers(model))


def classifier() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, pad_token_id=0, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)  # so that an edit shows
    return model


@torch.no_grad()
def test_the_text_of_a_classifier_is_a_prompt_as_a_whole_and_padding_is_none_of_it() -> None:
    ids = inputs("bert")["input_ids"]
    model, _ = adapted(classifier(), positions="prompt[-2:]")
    everywhere, _ = adapted(classifier(), positions="all[7:9]")
    expected = everywhere(input_ids=ids).logits
    assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-6)
    assert torch.allclose(model(input_ids=ids, labels=torch.tensor([0, 1, 1])).logits, expected, atol=1e-6)
    padded = torch.cat([ids, torch.zeros(3, 4, dtype=torch.long)], 1)
    mask = (torch.arange(13) < 9).long().expand(3, 13)
    assert torch.allclose(model(input_ids=padded, attention_mask=mask).logits, expected, atol=1e-4)
    with answering(model, start=START):
        assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-3)


def test_text_without_a_prompt_is_not_edited_which_is_said_and_training_on_it_is_an_error() -> None:
    model, _ = adapted(tiny("llama"), positions=BOTH)
    policies._warned = False
    with pytest.warns(PlainTextWarning, match="acts on no token of a call .* nothing says where the prompt ends"):
        assert torch.equal(logits_of(model, "llama"), logits_of(tiny("llama"), "llama"))
    model.train()
    with pytest.raises(PositionsError, match=r"'prompt\[0:2\]' tokens, .* give prompt_end or labels in the batch"):
        model(**inputs("llama"))
    ids = inputs("llama")["input_ids"]
    model(input_ids=ids, labels=ids.masked_fill(torch.arange(9) < 4, -100)).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters(model))


def test_checkpointed_blocks_are_edited_alike_in_the_backward_pass() -> None:
    ids, gradients = inputs("llama")["input_ids"], []
    for checkpointed in (False, True):
        model, _ = adapted(tiny("llama"), positions=BOTH)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(input_ids=ids, labels=ids.masked_fill(torch.arange(9) < 4, -100)).loss.backward()
        gradients.append([parameter.grad for parameter in parameters(model)])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


# -- the dial, merging, refusals -------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_dial_scales_the_change_and_at_zero_is_the_base() -> None:
    model, stack = adapted(tiny("llama"), positions="all")
    (first, *_) = layers(model)
    h = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2))
    whole = first.after(first.owner, (), h) - h
    stack.scale(0.5)
    assert torch.allclose(first.after(first.owner, (), h) - h, whole / 2, atol=1e-6)
    stack.scale(0.0)
    assert torch.equal(logits_of(model, "llama"), logits_of(tiny("llama"), "llama"))


def test_merging_is_refused_and_leaves_the_model() -> None:
    config = ReftConfig(target_modules=["model.layers.1"], width=32, positions="all")
    model = get_peft_model(tiny("llama"), config)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="no weight of the block computes that"):
            merge()
    assert torch.equal(logits_of(model.unload(), "llama"), logits_of(tiny("llama"), "llama"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "rank r must be at least 1, got 0"),
        ({"r": 40}, "no r=40 orthonormal rows of width 32"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"activation": "sigmoid"}, "activation must be one of linear, relu, gelu, swish, tanh, got 'sigmoid'"),
        ({"activation": "relu"}, 'choose activation="linear", or the authors\' start, init_reft_weights="paper"'),
        ({"init_reft_weights": "zeros"}, "must be True or \"paper\", got 'zeros'"),
        ({"positions": "prompt[0:2]+all[-2:]"}, r"'all\[-2:\]' are counted from the end of a text"),
        ({"positions": "prompt[0:2]+"}, "positions must be one of all, prompt"),
    ],
)
def test_a_configuration_that_cannot_be_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReftConfig(target_modules=["model.layers.1"], width=32, **options)
