"""A budget of KL on neutral text decides the strength: measured as `effects.kl` does, the same by hand and in fit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from statements import Module, Statements
from statements import trainer as quiet
from tiny_models import tiny
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_peft import adapters, edit_caa, edit_iti, load_adapter, save_adapter, strength_within
from lightning_peft.callbacks import CAA, ITI, Ablation, ActAdd, LoRA, RepE
from lightning_peft.effects import TextSettings, kl
from lightning_peft.fitting import strength_within as module_of_search
from lightning_peft.fitting.lower_blocks import blocks_below
from lightning_peft.fitting.reading_edit import ReadingEdit, edit

pytestmark = pytest.mark.filterwarnings("ignore")

GENERATOR = torch.Generator().manual_seed(0)
ROWS = [torch.randint(3, 64, (length,), generator=GENERATOR).tolist() for length in (9, 12, 5, 20)]
TEXTS = ["It is true.", "It is false.", "He is it.", "She is not he."] * 4
LABEL, GROUP = [1, 0] * 8, [i // 2 for i in range(16)]


def caa(model: nn.Module, tokenizer: Any, **options: Any) -> Any:
    return edit_caa(model, tokenizer, TEXTS, LABEL, GROUP, **{"multiplier": 30.0, "layers": [2], **options})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt", "wide_llama"])
def test_the_strength_that_is_found_has_the_kl_that_is_said(kind: str, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny(kind).train()
    caa(model, tiny_tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = strength_within(model, 0.05, texts=ROWS, batch_size=2)
    stack = adapters(model)
    assert 0.047 <= found.kl <= 0.05 and found.tokens == sum(map(len, ROWS)) - len(ROWS)
    assert model.training and stack["caa"].scale == 1.0 and len(blocks_below(stack, "caa")) == 2
    stack.scale(found.scale)
    assert kl(model, "caa", ROWS, batch_size=2).mean == pytest.approx(found.kl, rel=1e-5)
    assert found == strength_within(model, 0.05, texts=ROWS, batch_size=2) or found.scale < 1  # up to the one it has


def test_the_base_and_the_blocks_below_are_computed_once(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model, calls = tiny("llama"), [0, 0]
    caa(model, tiny_tokenizer)
    for i, block in enumerate((model.model.layers[0], model.model.layers[2])):
        block.mlp.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    found = strength_within(model, 0.05, texts=ROWS)
    # the base, one trial without the lower blocks, and each strength
    assert calls == [1, 2 + len(found.tried)] and len(found.tried) > 2
    assert not any("forward" in vars(module) for module in model.model.layers)


class Peeking(nn.Module):
    """A language model whose last block also reads what the first one computed inside."""

    class Block(nn.Module):
        def __init__(self, width: int, peek: nn.Module | None) -> None:
            super().__init__()
            self.mlp = nn.Linear(width, width)
            self.seen = torch.zeros(())
            self.below = [peek]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = self.mlp(x).tanh()
            return x + self.seen + (0 if self.below[0] is None else self.below[0].seen)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = self.Block(16, None)
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)
        self.layers = nn.ModuleList([first, self.Block(16, None), self.Block(16, first)])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_a_model_that_needs_its_lower_blocks_has_them(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = Peeking()
    endings = [text.removesuffix(".") for text in TEXTS]  # it has no attention to tell texts apart by
    edit_caa(model, tiny_tokenizer, endings, LABEL, GROUP, layers=[2], multiplier=9.0, positions="all")
    found = strength_within(model, 0.02, texts=[*ROWS, ROWS[0][::-1]], batch_size=1)
    adapters(model).scale(found.scale)
    assert found.scale < 1
    assert kl(model, "caa", [*ROWS, ROWS[0][::-1]], batch_size=1).mean == pytest.approx(found.kl, rel=1e-5)


METHODS: dict[str, ReadingEdit[Any]] = {
    "iti": ITI(num_heads=3, val_fraction=0.3, alpha=500.0, max_kl=0.01, kl_texts=ROWS),
    "gated iti": ITI(num_heads=3, val_fraction=0.3, alpha=500.0, gate="adaptive", max_kl=0.01, kl_texts=ROWS),
    "caa": CAA(multiplier=-30.0, max_kl=0.01, kl_texts=ROWS),
    "repe": RepE(coeff=50.0, max_kl=0.01, kl_texts=ROWS),
    "ablation": Ablation(alpha=-9.0, max_kl=0.01, kl_texts=ROWS),
    "act_add": ActAdd("true", "not so", coeff=50.0, max_kl=0.01, kl_texts=ROWS),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_reading_edit_has_it_and_its_folder_the_strength(
    method: ReadingEdit[Any], tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = tiny("llama")
    put = edit(model, tiny_tokenizer, TEXTS, LABEL, GROUP, method)
    within = json.loads(json.dumps(put.record))["max_kl"]
    assert method.strength_ is not None and 0 < within["kl"] <= 0.01 and put.scale == 1.0
    assert put.config.alpha == within["strength"] and abs(within["strength"]) < abs(within["asked"])
    assert kl(model, method.name, ROWS).mean == pytest.approx(within["kl"], rel=1e-5)
    other = tiny("llama")
    load_adapter(other, save_adapter(model, tmp_path / "edit"))
    assert kl(other, None, ROWS).mean == kl(model, method.name, ROWS).mean


def test_without_it_an_edit_is_what_it_was(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    put = caa(tiny("llama"), tiny_tokenizer)
    assert "max_kl" not in put.record and put.config.alpha == 30.0


def test_fit_finds_it_and_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    def run() -> tuple[Module, L.Trainer, CAA]:
        module, method = Module(), CAA(multiplier=30.0, max_kl=0.05, kl_texts=ROWS)
        made = quiet(method)
        made.fit(module, Statements().loader())
        return module, made, method

    module, made, method = run()
    part = adapters(module)["caa"]
    assert method.multiplier if hasattr(method, "multiplier") else method.alpha == 30.0
    assert part.config.alpha == method.strength_.scale * 30.0 and part.record["max_kl"]["kl"] <= 0.05
    assert made.callback_metrics["edit_kl"] == pytest.approx(method.strength_.kl)
    again = run()[0]
    assert adapters(again)["caa"].config.alpha == part.config.alpha  # deterministic
    made.save_checkpoint(tmp_path / "edit.ckpt")
    (tested,) = made.test(module, Statements().loader(), verbose=False)
    fresh = Module()
    other = quiet(CAA(multiplier=30.0, max_kl=0.05, kl_texts=ROWS))
    (loaded,) = other.test(fresh, Statements().loader(), ckpt_path=str(tmp_path / "edit.ckpt"), verbose=False)
    assert loaded == tested and adapters(fresh)["caa"].record == part.record
    made = quiet(method)  # a second fit begins at the strength asked for
    made.fit(module, Statements().loader())
    assert adapters(module)["caa"].record["max_kl"] == part.record["max_kl"]
    with pytest.raises(ValueError, match=r"^The backbone already has an adapter 'caa' with other settings: alpha: "):
        quiet(CAA(multiplier=30.0)).test(module, Statements().loader(), verbose=False)


def test_every_process_goes_by_the_kl_of_one(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model, sent = tiny("llama"), []
    caa(model, tiny_tokenizer)
    first = strength_within(model, 0.05, texts=ROWS, share=lambda value: sent.append(value) or value)
    received = iter(sent)
    other = strength_within(tiny_with_other_rounding(tiny_tokenizer), 0.05, texts=ROWS, share=lambda _: next(received))
    assert first == other


def tiny_with_other_rounding(tokenizer: Any) -> nn.Module:
    model = tiny("llama").to(torch.float64)
    caa(model, tokenizer)
    return model


def test_on_half_precision_and_other_adapters_below(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny("llama").to(torch.bfloat16)
    LoRA(r=2).apply(model)
    for tensor in adapters(model).live(adapters(model)["lora"]).values():
        tensor.normal_(generator=torch.Generator().manual_seed(1))
    caa(model, tiny_tokenizer, multiplier=100.0, max_kl=0.05, kl_texts=ROWS)
    assert 0.02 < adapters(model)["caa"].record["max_kl"]["kl"] <= 0.05
    with pytest.raises(ValueError, match=r"^The model has several adapters, 'lora', 'caa': name the one whose strengt"):
        strength_within(model, 0.05, texts=ROWS)
    assert strength_within(model, 0.01, texts=ROWS, adapter="lora").scale < 1  # a tuned one has a dial too


def test_a_strength_that_is_within_the_budget_is_kept_and_said(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.warns(
        UserWarning, match=r"^Adapter 'caa' keeps the strength asked for, 0\.001: at KL .* is within max"
    ):
        put = caa(tiny("llama"), tiny_tokenizer, multiplier=0.001, max_kl=0.5, kl_texts=ROWS)
    assert put.config.alpha == 0.001 and put.record["max_kl"]["tried"] == [[0.001, put.record["max_kl"]["kl"]]]


def test_kl_that_does_not_rise_throughout_is_said() -> None:
    tried = ((0.1, 0.2), (0.2, 0.6), (0.5, 0.3), (1.0, 2.0))
    found = module_of_search.StrengthWithin(0.1, 0.2, 0.5, tried, 30, "")
    assert not found.monotone and "does not rise with strength throughout" in found.sentence("caa", 8.0)
    assert found.record(8.0)["tried"][1] == [1.6, 0.6]
    with pytest.warns(UserWarning, match=r"^Adapter 'caa' has strength 0\.8 of the 8 asked for"):
        module_of_search.warn_of(found, "caa", 8.0)


def test_what_cannot_be_measured_is_one_sentence_before_anything_is_read(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError):
            CAA(max_kl=wrong)
    for texts in (None, TextSettings(tokens=64), ["It is."]):
        module = Module()
        with pytest.raises(ValueError, match=r"^CAA\(max_kl=0\.5\) measures text, but Module has no attribute tokeniz"):
            quiet(CAA(max_kl=0.5, kl_texts=texts)).fit(module, Statements().loader())
        assert not module.seen
    with pytest.raises(ValueError, match=r"^max_kl needs a causal language model, and T5ForConditionalGeneration is"):
        edit(tiny("t5"), tiny_tokenizer, TEXTS, LABEL, GROUP, CAA(positions="all", max_kl=0.5))
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"^Text 1 has fewer than 2 tokens, and nothing predicts the first: leave it"):
        caa(model, tiny_tokenizer, max_kl=0.5, kl_texts=[[3, 4], [5]])
    assert not hasattr(model, "_lightning_peft_stack")  # taken off again


def test_no_strength_within_the_budget_is_one_sentence(
    tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_of_search._Measured, "kl", lambda self, strength: 1.0)
    with pytest.raises(ValueError, match=r"^No strength of adapter 'caa' is within max_kl=0\.5: at .* is 1 nats a tok"):
        caa(tiny("llama"), tiny_tokenizer, max_kl=0.5, kl_texts=ROWS)


def test_the_packages_prose_is_the_default(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny("llama")
    put = edit_iti(
        model, tiny_tokenizer, TEXTS, LABEL, GROUP, num_heads=3, val_fraction=0.3, alpha=2000.0, max_kl=0.01,
        kl_texts=TextSettings(tokens=64, length=32),
    )  # fmt: skip
    text = TextSettings(tokens=64, length=32).text()
    assert text is not None and put.record["max_kl"]["texts_sha256"] == text.sha256
    assert kl(model, "iti", text, tiny_tokenizer).mean == pytest.approx(put.record["max_kl"]["kl"], rel=1e-5)


@pytest.mark.real_model
def test_on_a_real_model_the_budget_is_met(smollm2: Path, all_threads: None) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    answers = ("Certainly, I would be glad to.", "No, leave me alone.")
    texts = [f"Q: Could you bring the {thing}? A: {answer}" for thing in ("milk", "ladder") for answer in answers]
    settings = TextSettings(tokens=128, length=64)
    put = edit_caa(model, tokenizer, texts, [1, 0, 1, 0], [0, 0, 1, 1], multiplier=8.0, max_kl=0.5, kl_texts=settings)
    within, text = put.record["max_kl"], settings.text()
    assert text is not None and 0.475 <= within["kl"] <= 0.5 and len(within["tried"]) <= 8
    assert kl(model, "caa", text, tokenizer).mean == pytest.approx(within["kl"], rel=1e-5)
