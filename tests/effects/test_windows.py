"""Texts longer than a model's window, or its sliding window, and the numbers that transformers' own loss gives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from edits import add_lora
from tiny_models import VOCABULARY, tiny
from torch import Tensor, nn

from lightning_peft.backbone.window import ContextWindowWarning
from lightning_peft.effects import batch_effects, cross_entropy, kl

t: Any = transformers
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3}
SMALL = SIZES | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}


def made(model: nn.Module) -> nn.Module:
    """Return a model whose predictions are far from uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def gemma3() -> nn.Module:
    """Layers of a sliding window of 8 tokens, and one that sees all, with rotations of its own."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    return made(t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SMALL, sliding_window=8, layer_types=kinds)))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gemma3": (gemma3, "o_proj"),
    "mistral": (lambda: made(t.MistralForCausalLM(t.MistralConfig(**SMALL, sliding_window=8))), "o_proj"),
    "gpt2": (lambda: tiny("gpt2"), "c_proj"),
    "llama": (lambda: tiny("llama"), "o_proj"),
    "gpt_neox": (lambda: tiny("gpt_neox"), "dense"),
    "opt": (lambda: tiny("opt"), "out_proj"),
    "mamba": (lambda: made(t.MambaForCausalLM(t.MambaConfig(**SIZES, state_size=4))), "x_proj"),
}
BEYOND_SLIDING = (40, 17, 2, 9)


def texts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def plain(model: Any, text: Tensor) -> tuple[float, Tensor]:
    """Return transformers' own loss of one text alone, and the distribution after each of its tokens."""
    output = model(input_ids=text[None], labels=text[None])
    logits = output.logits
    if model.config.model_type == "mamba":  # which gives logits in float32, whatever it computes in
        logits = model.lm_head(model.backbone(text[None]).last_hidden_state)
    return float(output.loss), logits[0, :-1].double().log_softmax(-1)


def in_double(kind: str) -> tuple[Any, str]:
    torch.manual_seed(0)
    build, target = MODELS[kind]
    return build().double(), target


@pytest.mark.parametrize("kind", MODELS)
def test_cross_entropy_is_the_plain_loss_and_kl_a_plain_computation_in_float64(kind: str) -> None:
    model, target = in_double(kind)
    rows = texts(*BEYOND_SLIDING)
    base = [plain(model, row) for row in rows]
    stack = add_lora(model, [target])
    after = [plain(model, row) for row in rows]
    divergence, loss = kl(model, "lora", rows), cross_entropy(model, "lora", rows)
    assert divergence.tokens == loss.tokens == tuple(n - 1 for n in BEYOND_SLIDING)
    for i in range(len(rows)):
        before, now = base[i][1], after[i][1]
        assert divergence.by_text[i] == pytest.approx(float((before.exp() * (before - now)).sum(-1).mean()), abs=1e-9)
        assert loss.by_text[i] == pytest.approx(after[i][0], abs=1e-6)  # transformers' loss is float32
        assert divergence.by_text[i] > 1e-4
    with stack.disabled():
        assert cross_entropy(model, None, rows).by_text == pytest.approx([value for value, _ in base], abs=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_the_divergence_of_a_model_from_itself_is_exactly_zero_beyond_a_sliding_window_too(kind: str) -> None:
    model = MODELS[kind][0]()
    ids = torch.stack([text[:30] for text in texts(30, 30)])
    found = batch_effects(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, nullcontext)
    assert torch.equal(found[:, 3], torch.zeros(2, dtype=torch.float64)) and torch.equal(found[:, 1], found[:, 2])


def test_the_sliding_window_is_at_work() -> None:
    """Three layers of a window of 8 tokens reach 21 back: what follows does not see that the first token changed."""
    model, _ = in_double("mistral")
    [text] = texts(40)
    other = torch.cat((text[:1] + 1, text[1:]))
    same = [torch.equal(a, b) for a, b in zip(plain(model, text)[1], plain(model, other)[1], strict=True)]
    assert same == [False] * 22 + [True] * 17


@pytest.mark.parametrize("kind", ["mistral", "gpt2", "llama", "gpt_neox", "opt"])
def test_beyond_the_models_window_text_is_left_out_with_a_warning(kind: str) -> None:
    model, _ = in_double(kind)
    [long] = texts(150)
    with pytest.warns(ContextWindowWarning, match=r"^1 of 1 texts are longer than the 128 tokens"):
        loss = cross_entropy(model, None, [long])
    assert loss.tokens == (127,) and loss.mean == pytest.approx(plain(model, long[:128])[0], abs=1e-6)


def test_a_model_without_a_window_measures_all_of_a_text() -> None:
    model, _ = in_double("mamba")
    [long] = texts(150)
    assert cross_entropy(model, None, [long]).mean == pytest.approx(plain(model, long)[0], abs=1e-6)
