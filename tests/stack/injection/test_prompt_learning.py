"""A prompt on a backbone that stays the same object: calls with it give what plain peft gives, of the real tokens."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from edits import add_lora, close, fill
from peft import PeftModel, get_peft_model
from tiny_models import VOCABULARY, tiny
from torch import Tensor, nn

from lightning_peft.backbone.modules import base_modules
from lightning_peft.editing import head_offsets_config, head_sites
from lightning_peft.stack.adapter_files.saving import load_adapter, save_adapter
from lightning_peft.stack.stack import AdapterStack, stack_of

pytestmark = pytest.mark.filterwarnings("ignore:.*")
N = 3
CONFIGS: dict[str, Any] = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=N),
    "p": lambda: peft.PromptEncoderConfig(num_virtual_tokens=N, encoder_hidden_size=8),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=N),
    "projected": lambda: peft.PrefixTuningConfig(num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=8),
    "cartridge": lambda: peft.CartridgeConfig(num_virtual_tokens=N),
    "cpt": lambda: peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7], cpt_tokens_type_mask=[1, 2, 3]),
}
EMBEDDED = ("prompt", "p", "cpt")
KINDS = ("llama", "wide_llama", "gpt2", "opt", "t5")


def prompted(method: str, kind: str = "llama", name: str = "prompt") -> tuple[Any, AdapterStack]:
    model, stack = tiny(kind), None
    torch.manual_seed(1)
    stack = stack_of(model)
    stack.add(CONFIGS[method](), name)
    return model, stack


def inputs(kind: str) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(5))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return given | ({"decoder_input_ids": ids[:, :4]} if kind == "t5" else {})


def plain(folder: Path, kind: str = "llama") -> Any:
    return PeftModel.from_pretrained(tiny(kind), str(folder)).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["prompt", "p", "prefix", "projected"])
@torch.no_grad()
def test_calls_and_generation_are_plain_pefts(method: str, kind: str, tmp_path: Path) -> None:
    model, _ = prompted(method, kind)
    save_adapter(model, tmp_path)
    theirs, given = plain(tmp_path, kind), inputs(kind)
    ours = model(**given).logits
    assert ours.shape[1] == (4 if kind == "t5" else 7)
    same = close if method == "projected" else torch.equal  # whose network computes it for each row in training
    assert same(theirs(**given).logits[:, -ours.shape[1] :], ours)
    prompt = {name: given[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **options), theirs.generate(**prompt, **options))
    assert torch.equal(model(**given).logits, ours)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@torch.no_grad()
def test_off_and_taken_out_the_backbone_is_as_it_was(method: str, kind: str) -> None:
    base = tiny(kind)
    model, stack = prompted(method, kind)
    given, before = inputs(kind), base(**inputs(kind)).logits
    assert not torch.equal(model(**given).logits, before) and type(model) is type(base)
    with stack.disabled():
        assert torch.equal(model(**given).logits, before) and "forward" not in vars(model)
    model.generate(input_ids=given["input_ids"], max_new_tokens=2)
    stack.remove("prompt")
    assert torch.equal(model(**given).logits, before)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
    assert vars(model).keys() == vars(base).keys()
    assert model.config.to_dict() == base.config.to_dict()


@torch.no_grad()
def test_generation_leaves_nothing_behind() -> None:
    model, _ = prompted("prompt")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@torch.no_grad()
def test_copied_and_pickled_it_is_the_same_and_its_own(method: str) -> None:
    model, _ = prompted(method)
    given = inputs("llama")
    expected = model(**given).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**given).logits, expected)
        fill(stack_of(twin), "prompt", seed=9)
        assert not torch.equal(twin(**given).logits, expected)
        assert torch.equal(model(**given).logits, expected)


@pytest.mark.parametrize("keep", [1, 3, 7, 20, torch.tensor([0, 4]), torch.tensor([-1])], ids=str)
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@torch.no_grad()
def test_logits_to_keep_counts_real_tokens(method: str, keep: Any) -> None:
    model, _ = prompted(method)
    given = inputs("llama")
    whole = model(**given).logits
    expected = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
    torch.testing.assert_close(model(**given, logits_to_keep=keep).logits, expected)


@torch.no_grad()
def test_hidden_states_are_those_of_real_tokens_and_positional_arguments_serve() -> None:
    model, _ = prompted("prompt")
    given = inputs("llama")
    output = model(given["input_ids"], given["attention_mask"], output_hidden_states=True)
    assert {state.shape[1] for state in output.hidden_states} == {7}
    assert torch.equal(model(given["input_ids"], return_dict=False)[0], output.logits)


@pytest.mark.parametrize("method", ["prompt", "p", "prefix", "cartridge"])
def test_the_loss_of_labels_is_the_users_own(method: str) -> None:
    model, _ = prompted(method)
    ids = inputs("llama")["input_ids"]
    output = model(input_ids=ids, labels=ids)
    own = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    # with embeddings, the last virtual token's prediction of the first real one counts as well
    parts = 6 if method in ("prefix", "cartridge") else 7
    assert output.loss.isfinite()
    if parts == 6:
        torch.testing.assert_close(output.loss, own)
    output.loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)


@pytest.mark.parametrize("method", ["prompt", "prefix", "cartridge"])
@torch.no_grad()
def test_a_past_that_holds_the_prompt_is_gone_on_from(method: str) -> None:
    model, _ = prompted(method)
    given = inputs("llama")
    ids, mask = given["input_ids"], given["attention_mask"]
    positions = torch.arange(7).expand(2, -1)
    whole = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    first = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], position_ids=positions[:, :4], use_cache=True)
    rest = model(
        input_ids=ids[:, 4:], attention_mask=mask, position_ids=positions[:, 4:], past_key_values=first.past_key_values
    )
    assert close(torch.cat((first.logits, rest.logits), dim=1), whole)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@torch.no_grad()
def test_a_padded_row_generates_as_alone(method: str) -> None:
    model, _ = prompted(method)
    alone = torch.tensor([[9, 8, 7]])
    ids = torch.cat((torch.zeros(1, 4, dtype=torch.long), alone), dim=1)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    padded = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), **options)
    assert torch.equal(padded[:, 7:], model.generate(input_ids=alone, **options)[:, 3:])


# -- with others ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["lora", "prompt"])
@torch.no_grad()
def test_lora_and_a_prompt_act_together_and_alone(first: str, tmp_path: Path) -> None:
    model, given = tiny("llama"), inputs("llama")
    add: dict[str, Any] = {
        "lora": lambda: add_lora(model, ["q_proj", "embed_tokens"]),
        "prompt": lambda: stack_of(model).add(CONFIGS["prompt"](), "prompt"),
    }
    for name in sorted(add, key=lambda name: name != first):
        add[name]()
    stack = stack_of(model)
    fill(stack, "prompt")
    both = model(**given).logits
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {live for part in stack.parts for live in stack.keys(part).values()}
    save_adapter(model, tmp_path)
    again = tiny("llama")
    load_adapter(again, tmp_path)
    assert torch.equal(again(**given).logits, both)
    with stack.disabled("prompt"):
        assert torch.equal(model(**given).logits, plain(tmp_path / "lora")(**given).logits)
    with stack.disabled("lora"):
        assert torch.equal(model(**given).logits, plain(tmp_path / "prompt")(**given).logits[:, N:])
    with stack.disabled():
        assert torch.equal(model(**given).logits, tiny("llama")(**given).logits)
    modules = [name for name, _ in base_modules(model)]
    assert modules == [name for name, _ in tiny("llama").named_modules()]


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@torch.no_grad()
def test_offsets_and_a_prompt_generate_alike_with_and_without_a_cache(method: str) -> None:
    model, stack = prompted(method)
    fill(stack, "prompt")
    left = {"input_ids": torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])}
    left["attention_mask"] = (left["input_ids"] != 0).long()

    def generated(use_cache: bool) -> list[list[int]]:
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
        return model.generate(**left, **options).tolist()

    expected = generated(True)
    assert generated(False) == expected
    stack.add(head_offsets_config(head_sites(model), None, 1.0, "all"), "offsets")
    assert generated(True) == generated(False) == expected
    fill(stack, "offsets")
    expected = generated(True)
    for name in ("prompt", "offsets", "prompt"):
        stack.enable(False, name)
        stack.enable(True, name)
    assert generated(True) == generated(False) == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CONFIGS["prefix"](), "PromptTuningConfig and PrefixTuningConfig both act on the backbone's calls, so they"),
        (peft.PolyConfig(target_modules=["q_proj"]), "PromptTuningConfig and PolyConfig both act on the backbone's"),
    ],
)
def test_two_that_act_on_calls_are_refused(config: peft.PeftConfig, words: str) -> None:
    model, stack = prompted("prompt")
    expected = model(**inputs("llama")).logits
    with pytest.raises(ValueError, match=words):
        stack.add(config, "other")
    assert torch.equal(model(**inputs("llama")).logits, expected) and len(stack.parts) == 1


def test_an_edit_on_a_prompt_is_refused() -> None:
    model, stack = prompted("prompt")
    config = head_offsets_config(head_sites(model), [(0, 1)], 1.0, "all")
    with pytest.raises(ValueError, match="an edit at positions of tokens, which PromptTuningConfig moves"):
        stack.add(config, "edit", computed=True)


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        (
            "vit",
            CONFIGS["prompt"](),
            "needs a transformers model that takes inputs_embeds, and ViTForImageClassif",
        ),
        (
            "bert",
            CONFIGS["prefix"](),
            "transformers model that takes past_key_values, and BertForMaskedLM does not",
        ),
        ("llama", peft.PromptTuningConfig(), "PromptTuningConfig needs num_virtual_tokens, a positive number"),
    ],
)
def test_what_a_model_cannot_have_is_one_sentence(kind: str, config: peft.PeftConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stack_of(tiny(kind)).add(config, "prompt")


def test_a_past_and_activation_checkpointing_are_refused() -> None:
    model, _ = prompted("prefix")
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="gives the model a past, which checkpointing drops: turn that off"):
        model(**inputs("llama"))


def test_what_cannot_be_merged_says_so() -> None:
    _, stack = prompted("prompt")
    with pytest.raises(ValueError, match=r"^PromptTuningConfig cannot be merged: no weights compute what it does\.$"):
        stack.merge()


# -- folders of plain peft ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CONFIGS)
def test_a_folder_of_plain_peft_is_read_and_trained_on_from(method: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = CONFIGS[method]()
    config.task_type = "CAUSAL_LM"
    theirs, given = get_peft_model(tiny("llama"), config), inputs("llama")
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model: Any = tiny("llama")
    load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        expected = plain(tmp_path / "theirs")(**given).logits[:, -7:]
        assert torch.equal(model(**given).logits, expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**given).logits.square().mean().backward()
    optimizer.step()
    save_adapter(model, tmp_path / "ours")
    with torch.no_grad():
        moved = model(**given).logits
        assert not torch.equal(moved, expected)
        assert torch.equal(plain(tmp_path / "ours")(**given).logits[:, -7:], moved)


@torch.no_grad()
def test_a_classifiers_head_is_trained_and_saved_with_its_prompt(tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    def classifier() -> Any:
        torch.manual_seed(0)
        config = copy.deepcopy(tiny("llama").config)
        config.num_labels = 4
        return LlamaForSequenceClassification(config).eval()

    model, given = classifier(), inputs("llama")
    base = model(**given).logits
    stack = stack_of(model)
    stack.add(CONFIGS["prompt"](), "prompt")
    assert any("score" in name for name, p in model.named_parameters() if p.requires_grad)
    fill(stack, "prompt")
    moved = model(**given).logits
    save_adapter(model, tmp_path)
    assert torch.equal(PeftModel.from_pretrained(classifier(), str(tmp_path)).eval()(**given).logits, moved)
    with stack.disabled():
        assert torch.equal(model(**given).logits, base)
    stack.remove("prompt")
    assert torch.equal(model(**given).logits, base) and model.state_dict().keys() == classifier().state_dict().keys()


# -- weights that layers share, and other forwards of their own -----------------------------------------------------


@pytest.mark.parametrize("config", [peft.VeraConfig, peft.VBLoRAConfig, peft.TinyLoraConfig])
def test_what_layers_share_is_in_the_backbone_once(config: Any) -> None:
    options = {"vector_length": 4, "num_vectors": 8, "r": 2} if config is peft.VBLoRAConfig else {}
    model = tiny("llama")
    stack = stack_of(model)
    part = stack.add(config(target_modules=["q_proj", "v_proj"], **options), "a")
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len({id(p) for p in parameters}) == len(parameters)
    assert all(id(p) in {id(q) for q in model.parameters()} for p in part.tuner.parameters())
    assert any(name.startswith("adapter_state.a.") for name in model.state_dict())
    model.to(torch.float64)
    assert {t.dtype for t in stack.tensors(part).values() if t.is_floating_point()} == {torch.float64}
    with pytest.raises(ValueError, match="shares weights between layers, so a backbone carries one, and has 'a' alre"):
        stack.add(config(target_modules=["k_proj"], **options), "b")


def test_tasks_of_a_call_reach_the_layers_and_generation() -> None:
    model: Any = tiny("llama")
    stack = stack_of(model)
    stack.add(peft.PolyConfig(target_modules=["q_proj"], n_tasks=2, n_skills=2, n_splits=2, r=4), "poly")
    fill(stack, "poly")
    ids = inputs("llama")["input_ids"]
    zero, one = (model(input_ids=ids, task_ids=torch.full((2,), task)).logits for task in (0, 1))
    assert not torch.equal(zero, one)
    tokens = model.generate(ids, task_ids=torch.ones(2, dtype=torch.long), max_new_tokens=1, do_sample=False)
    assert torch.equal(tokens[:, -1], one[:, -1].argmax(-1))


def test_the_shadow_networks_loss_is_added_to_the_models() -> None:
    losses = []
    for weight in (0.0, 1.0):
        model: Any = tiny("llama")
        torch.manual_seed(3)
        stack_of(model).add(peft.ShadowConfig(auxiliary_loss_weight=weight), "shadow")
        ids = inputs("llama")["input_ids"]
        losses.append(model(input_ids=ids, labels=ids).loss)
    assert losses[1] > losses[0] + 1


def test_warnings_of_arguments_that_are_honoured_are_not_given() -> None:
    model, _ = prompted("prompt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**inputs("llama"), position_ids=torch.arange(7).expand(2, -1))
    assert not [warning for warning in caught if "osition ids" in str(warning.message)]
