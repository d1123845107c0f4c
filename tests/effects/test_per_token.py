"""KL and cross-entropy by hand, of an adapter on a model, in a folder, of peft's own; the model stays as it was."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from edits import add_lora, add_offsets, fill
from tiny_models import VOCABULARY, tiny
from torch import Tensor, nn

from lightning_peft import AdapterError, load_adapter, save_adapter
from lightning_peft.effects import PerToken, TextEffects, cross_entropy, kl, text_effects, text_slice
from lightning_peft.models import CausalLM
from lightning_peft.stack.stack import AdapterStack, find_stacks, stack_of

LENGTHS = (17, 9, 2, 12)


def rows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


TEXTS = rows(*LENGTHS)


@torch.no_grad()
def logprobs(model: Any, text: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([text])).logits[0, :-1].double().log_softmax(-1)


def by_definition(base: Any, other: Any) -> list[float]:
    """KL per token of each text, from two models, each text alone."""
    pairs = [(logprobs(base, text), logprobs(other, text)) for text in TEXTS]
    return [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs]


def lora_and_edit() -> tuple[nn.Module, AdapterStack]:
    model = tiny("llama")
    add_lora(model, ["q_proj", "v_proj"])
    return model, add_offsets(model)


def snapshot(model: nn.Module) -> Any:
    """What a model is made of: weights, their gradients' flags, modes, hooks, attributes and predictions."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modules = {
        name: (type(m).__name__, m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }
    active = {
        name: (list(m.active_adapters), m.disable_adapters)
        for name, m in model.named_modules()
        if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)
    }
    return state, flags, modules, active, [logprobs(model, text) for text in TEXTS]


def same(before: Any, after: Any) -> bool:
    states = [before[0], after[0]]
    equal = states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    predictions = all(torch.equal(a, b) for a, b in zip(before[4], after[4], strict=True))
    return equal and predictions and before[1:4] == after[1:4]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the LoRA adapter and the edit of `lora_and_edit`."""
    return save_adapter(lora_and_edit()[0], tmp_path / "both")


@pytest.fixture
def edit_folder(tmp_path: Path) -> Path:
    model = tiny("llama")
    add_offsets(model)
    return save_adapter(model, tmp_path / "edit")


# -- on the model --------------------------------------------------------------------------------------------------


def test_all_that_is_on_is_measured_against_the_bare_model() -> None:
    model, _ = lora_and_edit()
    found = kl(model, None, TEXTS)
    assert found.by_text == pytest.approx(by_definition(tiny("llama"), model), abs=1e-6)
    assert found.tokens == (16, 8, 1, 11)
    assert found.mean == pytest.approx(sum(k * n for k, n in zip(found.by_text, found.tokens, strict=True)) / 36)


@pytest.mark.parametrize("name", ["lora", "edit"])
def test_an_adapter_by_its_name_is_measured_with_the_others_on_on_both_sides(name: str) -> None:
    model, _ = lora_and_edit()
    found = kl(model, name, TEXTS).by_text
    without, other = lora_and_edit()
    other.enable(False, name)
    assert found == pytest.approx(by_definition(without, model), abs=1e-6)
    assert found != pytest.approx(kl(model, None, TEXTS).by_text, rel=1e-3)


def test_an_adapter_that_is_off_is_switched_on_for_the_measurement_alone() -> None:
    model, stack = lora_and_edit()
    on = kl(model, "edit", TEXTS), cross_entropy(model, "edit", TEXTS)
    stack.enable(False, "edit")
    before = snapshot(model)
    assert (kl(model, "edit", TEXTS), cross_entropy(model, "edit", TEXTS)) == on
    assert not stack["edit"].enabled and same(before, snapshot(model))


def test_none_leaves_out_what_is_switched_off() -> None:
    model, stack = lora_and_edit()
    alone = kl(model, "lora", TEXTS)
    stack.enable(False, "edit")
    assert kl(model, None, TEXTS) != alone
    assert kl(model, None, TEXTS) == kl(model, "lora", TEXTS)


def test_a_strength_of_zero_is_a_divergence_of_exactly_zero() -> None:
    model, stack = lora_and_edit()
    stack.scale(0.0)
    assert kl(model, None, TEXTS) == PerToken(0.0, (0.0,) * 4, (16, 8, 1, 11))


@pytest.mark.parametrize("adapter", [None, "lora", "edit"])
def test_cross_entropy_is_the_models_own_loss_with_the_adapter(adapter: str | None) -> None:
    model, _ = lora_and_edit()
    losses = [float(model(input_ids=(ids := torch.tensor([text])), labels=ids).loss) for text in TEXTS]
    assert cross_entropy(model, adapter, TEXTS).by_text == pytest.approx(losses, abs=1e-5)
    bare = tiny("llama")
    losses = [float(bare(input_ids=(ids := torch.tensor([text])), labels=ids).loss) for text in TEXTS]
    assert cross_entropy(bare, None, TEXTS).by_text == pytest.approx(losses, abs=1e-5)


# -- in a folder ---------------------------------------------------------------------------------------------------


def test_a_folder_is_put_on_measured_and_taken_off(folder: Path) -> None:
    adapted, _ = lora_and_edit()
    model = tiny("llama").train()
    before = snapshot(model.eval())
    model.train()
    for given in (folder, str(folder)):
        assert kl(model, given, TEXTS).by_text == pytest.approx(kl(adapted, None, TEXTS).by_text, rel=1e-6)
        loss = cross_entropy(model, given, TEXTS)
        assert loss.by_text == pytest.approx(cross_entropy(adapted, None, TEXTS).by_text, rel=1e-6)
    assert all(module.training for module in model.modules()) and not find_stacks(model)
    assert same(before, snapshot(model.eval()))


def test_a_folder_goes_on_top_of_what_is_there(edit_folder: Path) -> None:
    model = tiny("llama")
    add_lora(model, ["q_proj", "v_proj"])
    stack_of(model).train(["lora"])
    before = snapshot(model)
    both, _ = lora_and_edit()
    assert kl(model, edit_folder, TEXTS).by_text == pytest.approx(kl(both, "edit", TEXTS).by_text, rel=1e-6)
    assert same(before, snapshot(model)) and [part.name for part in stack_of(model).parts] == ["lora"]


def test_a_name_on_the_model_goes_before_a_folder_of_that_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder.rename("edit")
    model = tiny("llama")
    stack = add_offsets(model, alpha=0.1)
    weak = kl(model, "edit", TEXTS)
    stack.remove("edit")
    load_adapter(model, "edit")
    assert weak.mean < 0.1 * kl(model, None, TEXTS).mean
    stack.remove("edit"), stack.remove("lora")
    assert kl(model, "edit", TEXTS).mean > 10 * weak.mean


def test_an_edit_of_answers_acts_at_every_position_of_a_text(tmp_path: Path) -> None:
    model = tiny("llama")
    add_offsets(model, "answer")
    answers = kl(model, None, TEXTS)
    every = tiny("llama")
    add_offsets(every, "all")
    assert answers == kl(every, None, TEXTS)


class Stop(Exception):
    pass


def test_the_model_is_as_it_was_after_an_exception_too(folder: Path) -> None:
    model = tiny("llama")
    before = snapshot(model)
    handle = model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        kl(model, folder, TEXTS)
    handle.remove()
    assert same(before, snapshot(model)) and not find_stacks(model)


# -- of peft's own -------------------------------------------------------------------------------------------------


def with_peft(active: str = "one", head: bool = True) -> Any:
    """Two LoRA adapters of plain peft, which replace each other, and perhaps the head of each."""
    heads = ["lm_head"] if head else None
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", modules_to_save=heads)
    model = peft.get_peft_model(tiny("llama"), config, "one")
    model.add_adapter("two", config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            seed = 1 + ("two" in name)
            parameter.data.normal_(generator=torch.Generator().manual_seed(seed))
    model.set_adapter(active)
    return model.eval()


@pytest.mark.parametrize("adapter", [None, "one", "two"])
def test_an_adapter_that_peft_put_on_is_measured_alone(adapter: str | None) -> None:
    model = with_peft()
    before = snapshot(model)
    expected = by_definition(tiny("llama"), with_peft(adapter or "one"))
    assert kl(model, adapter, TEXTS).by_text == pytest.approx(expected, abs=1e-6) and min(expected) > 1e-4
    assert same(before, snapshot(model)) and model.active_adapter == "one"


def test_two_that_act_together_are_measured_each_on_top_of_the_other() -> None:
    model = with_peft(head=False)
    model.base_model.set_adapter(["one", "two"])
    before = snapshot(model)
    expected = by_definition(with_peft("two", head=False), model)
    assert kl(model, "one", TEXTS).by_text == pytest.approx(expected, abs=1e-6)
    assert same(before, snapshot(model))


def test_what_transformers_loaded_is_measured_too(tmp_path: Path) -> None:
    with_peft().save_pretrained(tmp_path, selected_adapters=["one"])
    model = tiny("llama")
    model.load_adapter(str(tmp_path / "one"), adapter_name="mine")
    expected = kl(with_peft(), "one", TEXTS).by_text
    assert kl(model, "mine", TEXTS).by_text == pytest.approx(expected, rel=1e-6)
    model.disable_adapters()
    before = snapshot(model)
    assert kl(model, "mine", TEXTS).by_text == pytest.approx(expected, rel=1e-6)
    assert same(before, snapshot(model))
    with pytest.raises(ValueError, match=r"^All adapters on the model are switched off: name one, or switch one on\.$"):
        kl(model, None, TEXTS)


def test_a_prompt_of_peft_is_measured_and_another_one_is_a_sentence() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(tiny("llama"), config, "mine").eval()
    found = kl(model, None, TEXTS)
    assert found == kl(model, "mine", TEXTS) and min(found.by_text) > 0 and found.tokens == (16, 8, 1, 11)
    model.add_adapter("other", config)
    with pytest.raises(ValueError, match=r"^Adapter 'other' is not the one that acts: make it so by set_adapter"):
        kl(model, "other", TEXTS)


def test_what_cannot_be_switched_off_has_a_cross_entropy_and_no_divergence(tmp_path: Path) -> None:
    model = tiny("llama")
    stack_of(model).add(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"), "pissa")
    assert cross_entropy(model, None, TEXTS).mean > 0
    for adapter in (None, "pissa"):
        with pytest.raises(ValueError, match="cannot be switched off"):
            kl(model, adapter, TEXTS)


# -- texts ---------------------------------------------------------------------------------------------------------


def test_strings_tokens_tensors_and_slices_are_the_same_texts(tiny_tokenizer: Any) -> None:
    model, stack = lora_and_edit()
    slice = text_slice(tokens=60, length=12)
    expected = TextEffects()(text_effects(model, tiny_tokenizer, slice, stack.disabled))
    ids = [tiny_tokenizer(text)["input_ids"] for text in slice.documents]
    whole = kl(model, None, slice, tiny_tokenizer)
    assert whole.mean == expected["kl"] and cross_entropy(model, None, slice, tiny_tokenizer).mean == expected["ce"]
    assert kl(model, None, list(slice.documents), tiny_tokenizer) == whole
    assert kl(model, None, ids) == kl(model, None, map(torch.tensor, ids)) == whole
    assert kl(model, None, torch.tensor(rows(9, 9))) == kl(model, None, rows(9, 9))


def test_a_model_of_ones_own_that_gives_logits_alone_is_measured() -> None:
    model = tiny("hand_written")
    text = torch.tensor(TEXTS[0])
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(text[None])[0, :-1], text[1:])
    assert cross_entropy(model, None, [text]).mean == pytest.approx(float(expected), abs=1e-5)
    stack = stack_of(model)
    stack.add(peft.LoraConfig(r=2, target_modules=["proj"]), "lora")
    fill(stack, "lora")
    assert kl(model, "lora", TEXTS).mean > 1e-4


def wrong() -> Iterator[tuple[str, dict[str, Any], str]]:
    yield "no adapter", {"adapter": None, "model": tiny("llama")}, "No adapter is on LlamaForCausalLM, so there is"
    yield (
        "unknown",
        {"adapter": "lorra"},
        "'lorra' is neither a folder nor the name of an adapter on the model, which",
    )
    yield "unknown on a bare one", {"adapter": "x", "model": tiny("gpt2")}, "adapter on the model, which has none."
    yield "a string", {"texts": "It is."}, "Texts are a list of strings, or of lists of tokens, one at least; got 'It"
    yield "one row", {"texts": [3, 4, 5]}, "Texts are a list of strings, or of lists of tokens, one at least; got '[3,"
    yield "none", {"texts": []}, "Texts are a list of strings, or of lists of tokens, one at least; got '[]'."
    yield "no tokenizer", {"texts": ["It is."]}, "The texts are strings: give the model's tokenizer as well, or"
    yield (
        "short",
        {"texts": [[3, 4], [5]]},
        "Text 1 has fewer than 2 tokens, and nothing",
    )
    yield "foreign", {"texts": [[3, 64]]}, "Text 0 has token 64, but the model has 64: is it another's tokenizer?"
    yield "t5", {"model": tiny("t5"), "measure": cross_entropy}, "need a causal language model, and T5ForConditional"


@pytest.mark.parametrize(("given", "sentence"), [pytest.param(g, s, id=name) for name, g, s in wrong()])
def test_what_cannot_be_measured_is_one_sentence(given: dict[str, Any], sentence: str) -> None:
    given = dict(given)
    model = given.pop("model", None) or lora_and_edit()[0]
    measure, adapter = given.pop("measure", kl), given.pop("adapter", None)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        measure(model, adapter, given.pop("texts", TEXTS))


def test_merged_adapters_modules_of_lightning_and_folders_without_an_adapter_are_one_sentence(
    tmp_path: Path, tiny_folder: Any
) -> None:
    model = tiny("llama")
    add_lora(model, ["q_proj"]).merge()
    with pytest.raises(ValueError, match=r"^The model has adapters merged into its weights: unmerge them"):
        kl(model, "lora", TEXTS)
    for measure in (kl, cross_entropy):
        with pytest.raises(ValueError, match=r"^CausalLM is a LightningModule: give the language model in it\.$"):
            measure(CausalLM(str(tiny_folder("llama"))), None, TEXTS)
    with pytest.raises(AdapterError):
        kl(tiny("llama"), tmp_path, TEXTS)
