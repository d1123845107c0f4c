"""What an adapter changes on text is measured against the definition, on every kind of model and adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from edits import add_lora, add_offsets, edited, fill
from peft import PromptTuningConfig
from tiny_models import LANGUAGE_MODELS, VOCABULARY, tiny
from torch import Tensor, nn

from lightning_peft.effects import TextEffects, batch_effects, text_effects, text_slice
from lightning_peft.stack.stack import AdapterStack, adapters, stack_of
from lightning_peft.testing.architectures import TinyModule
from lightning_peft.testing.cell import trainable
from lightning_peft.testing.methods import METHODS

LENGTHS = (17, 9, 2, 12)


def rows(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]


def padded(texts: list[Tensor], side: str = "right", extra: int = 0) -> dict[str, Tensor]:
    width = max(map(len, texts)) + extra
    pads = [width - len(text) for text in texts]
    sides = [(0, pad) if side == "right" else (pad, 0) for pad in pads]
    return {
        "input_ids": torch.stack([nn.functional.pad(t, p) for t, p in zip(texts, sides, strict=True)]),
        "attention_mask": torch.stack(
            [nn.functional.pad(torch.ones_like(t), p) for t, p in zip(texts, sides, strict=True)]
        ),
    }


def definition(model: nn.Module, text: Tensor, stack: AdapterStack) -> list[float]:
    """One text alone: what `transformers` gives as its loss, and KL from whole distributions."""

    @torch.no_grad()
    def run() -> tuple[float, Tensor]:
        # a first -100: behind virtual tokens the loss would count the first token too, which nothing predicts here
        labels = torch.cat((torch.tensor([-100]), text[1:]))
        output = model(input_ids=text[None], labels=labels[None])
        return float(output.loss), output.logits[0, :-1].double().softmax(-1)

    loss, after = run()
    with stack.disabled():
        base_loss, before = run()
    n = len(text) - 1
    return [n, n * base_loss, n * loss, float((before * (before / after).log()).sum())]


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_cross_entropy_is_transformers_own_loss_and_kl_its_definition(kind: str) -> None:
    model, stack = edited(kind)
    found = batch_effects(model, padded(rows(*LENGTHS)), stack.disabled)
    expected = torch.tensor([definition(model, text, stack) for text in rows(*LENGTHS)])
    assert torch.equal(found[:, 0], torch.tensor([16.0, 8, 1, 11], dtype=torch.float64))
    per_token = found[:, 1:] / found[:, :1]
    torch.testing.assert_close(per_token.float(), expected[:, 1:] / expected[:, :1], atol=1e-5, rtol=1e-5)
    assert (found[:, 3] > 0).all() and not torch.allclose(found[:, 1], found[:, 2], atol=1e-3)


class Coin(nn.Module):
    """Says of every next token that it is 3 or 4, the one as likely as the other; adapted, that it is 3 with .8."""

    adapted = True

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        chances = torch.tensor([0.0, 0, 0, 0.8, 0.2] if self.adapted else [1e-30, 1e-30, 1e-30, 0.5, 0.5])
        logits = chances.clamp(min=1e-30).log().expand(*input_ids.shape, -1)
        return type("Output", (), {"logits": logits})()

    @contextmanager
    def off(self) -> Iterator[None]:
        self.adapted = False
        yield
        self.adapted = True


def test_cross_entropy_and_kl_by_hand() -> None:
    """3 4 3 3: the first token is not predicted; KL is .5 log(.5/.8) + .5 log(.5/.2) at each of the others."""
    coin = Coin()
    batch = {"input_ids": torch.tensor([[3, 4, 3, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    metric = TextEffects()
    metric.update(batch_effects(coin, batch, coin.off))
    assert metric.compute() == {
        "ce_base": pytest.approx(math.log(2), abs=1e-6),
        "ce": pytest.approx(-(2 * math.log(0.8) + math.log(0.2)) / 3, abs=1e-6),
        "kl": pytest.approx(0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2), abs=1e-6),
    }


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_kl_of_a_model_with_itself_is_exactly_zero(kind: str) -> None:
    model = tiny(kind)
    alone = batch_effects(model, padded(rows(*LENGTHS)))
    assert (alone[:, 3] == 0).all() and torch.equal(alone[:, 1], alone[:, 2])
    stack = add_offsets(model)
    stack.scale(0.0)
    off = batch_effects(model, padded(rows(*LENGTHS)), stack.disabled)
    assert (off[:, 3] == 0).all() and torch.equal(off, alone)


@pytest.mark.parametrize("positions", ["all", "answer", "generated"])
@pytest.mark.parametrize("alpha", [1e-4, 0.5, 15.0])
def test_any_strength_above_zero_gives_a_kl_above_zero(alpha: float, positions: str) -> None:
    model, stack = edited("llama", positions, alpha)
    found = batch_effects(model, padded(rows(*LENGTHS)), stack.disabled)
    assert (found[:, 3] > 0).all()


def test_kl_grows_as_the_square_of_a_small_strength() -> None:
    values = []
    for alpha in (1e-4, 1e-3, 1e-2):
        model, stack = edited("llama", alpha=alpha)
        values.append(float(batch_effects(model, padded(rows(*LENGTHS)), stack.disabled)[:, 3].sum()))
    assert values[1] / values[0] == pytest.approx(100, rel=0.1)
    assert values[2] / values[1] == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_neither_padding_nor_company_changes_a_document(kind: str, side: str) -> None:
    model, stack = edited(kind)
    texts = rows(*LENGTHS)
    together = batch_effects(model, padded(texts, side, extra=3), stack.disabled)
    alone = torch.cat([batch_effects(model, padded([text]), stack.disabled) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-5)


def test_the_batch_size_changes_nothing(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stack = edited("llama")
    slice = text_slice(tokens=60, length=12)
    whole = text_effects(model, tiny_tokenizer, slice, stack.disabled)
    monkeypatch.setattr("lightning_peft.effects.text_sums._CHUNK", 7)
    small = text_effects(model, tiny_tokenizer, slice, stack.disabled, batch_size=1)
    assert whole.shape == (5, 4)
    torch.testing.assert_close(whole, small, atol=1e-4, rtol=1e-5)


def test_the_head_is_computed_for_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stack = edited("llama")
    monkeypatch.setattr("lightning_peft.effects.text_sums._CHUNK", 7)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda m, a, output: sizes.append(output.shape[0] * output.shape[1]))
    batch_effects(model, padded(rows(*LENGTHS)), stack.disabled)
    assert max(sizes) == 7 and sum(sizes) >= 2 * (16 + 8 + 1 + 11)


class Capped(nn.Module):
    """A language model whose logits are capped after its head, as Gemma's are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny("llama")
        self.config = self.inner.config

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        output.logits = output.logits.div(3).tanh() * 3
        return output


def test_what_follows_the_head_counts() -> None:
    model = Capped()
    with torch.no_grad():
        text = rows(12)[0]
        logits = model(text[None]).logits[0, :-1]
    expected = nn.functional.cross_entropy(logits, text[1:], reduction="sum")
    assert float(batch_effects(model, padded([text]))[0, 2]) == pytest.approx(float(expected), abs=1e-4)


def test_a_head_that_must_see_every_position_is_not_called_alone() -> None:
    model, text = tiny("llama"), rows(12)[0]
    plain = batch_effects(model, padded([text]))

    def refuse(module: nn.Module, args: tuple[Tensor]) -> None:
        if args[0].shape[1] != len(text):
            raise RuntimeError("the positions of this call are unknown")

    model.lm_head.register_forward_pre_hook(refuse)
    torch.testing.assert_close(batch_effects(model, padded([text])), plain, atol=1e-4, rtol=1e-5)


def test_an_adapter_on_the_head_itself_is_switched_too() -> None:
    model = tiny("gpt_neox")
    stack = add_lora(model, ["lm_head"])
    found = batch_effects(model, padded(rows(*LENGTHS)), stack.disabled)
    expected = torch.tensor([definition(model, text, stack) for text in rows(*LENGTHS)])
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_shift_nothing(method: str, kind: str) -> None:
    configs = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
    model = tiny(kind)
    base = batch_effects(model, padded(rows(*LENGTHS)))
    stack = stack_of(model)
    stack.add(configs[method](num_virtual_tokens=4), "prompt")
    fill(stack, "prompt")
    found = batch_effects(model, padded(rows(*LENGTHS)), stack.disabled)
    expected = torch.tensor([definition(model, text, stack) for text in rows(*LENGTHS)])
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found[:, 1], base[:, 1]) and (found[:, 3] > 0).all()


def test_a_model_of_plain_peft_with_virtual_tokens_is_aligned_too() -> None:
    model = peft.get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    text = rows(12)[0]
    with torch.no_grad():
        logits = model(input_ids=text[None]).logits[0, 4:-1]
    expected = nn.functional.cross_entropy(logits, text[1:], reduction="sum")
    found = batch_effects(model, padded([text]), model.disable_adapter)
    assert float(found[0, 2]) == pytest.approx(float(expected), abs=1e-4)
    base = batch_effects(tiny("llama"), padded([text]))
    assert float(found[0, 1]) == pytest.approx(float(base[0, 1]), abs=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_measured_against_its_own_base(name: str) -> None:
    method = METHODS[name]
    module = TinyModule("llama")
    method.prepare(module)
    batch = padded(rows(*LENGTHS))
    base = batch_effects(module.backbone.eval(), batch)
    torch.manual_seed(5)
    method.make().apply(module)
    stack = adapters(module)
    with torch.no_grad():
        for parameter in trainable(stack.backbone).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).to(parameter))
    found = batch_effects(module.backbone.eval(), batch, stack.disabled)
    assert torch.equal(found[:, 1], base[:, 1]), "switched off it is the base"
    assert (found[:, 3] > 0).all() and not torch.equal(found[:, 2], base[:, 2]), "switched on it is not"


def test_text_beyond_the_context_is_left_out() -> None:
    model = tiny("gpt2")
    long = rows(200)[0]
    found = batch_effects(model, padded([long]))
    assert found[0, 0] == 127
    torch.testing.assert_close(found, batch_effects(model, padded([long[:128]])))


def test_an_encoder_decoder_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"need a causal language model, and T5ForConditionalGeneration is none\.$"):
        batch_effects(tiny("t5"), padded(rows(5)))


def test_dropout_is_off_and_the_mode_stays(tiny_tokenizer: Any) -> None:
    model = tiny("gpt2").train()
    model.transformer.h[1].eval()
    slice = text_slice(tokens=24, length=12)
    first, second = (text_effects(model, tiny_tokenizer, slice) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training and model.transformer.h[0].training and not model.transformer.h[1].training
