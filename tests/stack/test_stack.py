"""A stack holds adapters of different types on one backbone, each of which can be switched, scaled, saved by itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from edits import PROJECTIONS, add_lora, add_offsets, both, close, edited, logits
from peft import AdaptionPromptConfig, IA3Config, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig
from safetensors.torch import load_file
from tiny_models import LANGUAGE_MODELS, tiny
from torch import Tensor, nn

from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.adapter_files.saving import load_adapter, save_adapter
from lightning_peft.stack.stack import AdapterStack, adapters, find_stacks, stack_of
from lightning_peft.tuners.bottleneck import BottleneckConfig
from lightning_peft.tuners.head_offsets import HeadOffsetsConfig
from lightning_peft.tuners.ssb import SSBConfig
from lightning_peft.tuners.weight_deltas import WeightDeltasConfig

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*gradient_checkpointing")


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- putting on and taking off --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_off_is_the_base_bit_for_bit_for_each_and_all(kind: str, tokens: Tensor) -> None:
    base = logits(tiny(kind), tokens)
    model, stack = both(kind)
    lora_only = tiny(kind)
    add_lora(lora_only, [PROJECTIONS[kind]])
    edit_only, _ = edited(kind)
    all_on = logits(model, tokens)
    with stack.disabled():
        assert torch.equal(logits(model, tokens), base)
    with stack.disabled("edit"):
        assert torch.equal(logits(model, tokens), logits(lora_only, tokens))
    with stack.disabled("lora"):
        assert torch.equal(logits(model, tokens), logits(edit_only, tokens))
        with stack.disabled("edit"):
            assert torch.equal(logits(model, tokens), base)
        assert torch.equal(logits(model, tokens), logits(edit_only, tokens))
    assert torch.equal(logits(model, tokens), all_on)
    stack.enable(False, "edit")
    assert torch.equal(logits(model, tokens), logits(lora_only, tokens))
    stack.enable(True)
    assert torch.equal(logits(model, tokens), all_on)


def test_switching_leaves_requires_grad_alone() -> None:
    model, stack = both("llama")
    model.get_parameter("model.layers.1.self_attn.o_proj.head_offsets.edit").requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with stack.disabled():
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    with stack.disabled("lora"):
        pass
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert set(before.values()) == {True, False}


def test_only_adapters_can_be_trained() -> None:
    model, stack = both("llama")
    live = {name for part in stack.parts for name in stack.keys(part).values()}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == live
    stack.freeze()
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("order", [["edit", "lora"], ["lora", "edit"]])
def test_removing_gives_the_modules_themselves_back(kind: str, order: list[str], tokens: Tensor) -> None:
    model = tiny(kind)
    before, modules, base = weights(model), dict(model.named_modules()), logits(model, tokens)
    add_lora(model, [PROJECTIONS[kind]])
    stack = add_offsets(model)
    for name in order:
        stack.remove(name)
        assert name not in stack
    assert dict(model.named_modules()) == modules and same(weights(model), before)
    assert torch.equal(logits(model, tokens), base) and not hasattr(model, "peft_config")


def test_removing_one_leaves_the_other_as_if_alone(tokens: Tensor) -> None:
    model, stack = both("llama")
    stack.remove("lora")
    alone, _ = edited("llama")
    assert same(weights(model), weights(alone)) and torch.equal(logits(model, tokens), logits(alone, tokens))


def test_modules_saved_whole_are_switched_saved_and_removed_with_their_adapter(tokens: Tensor, tmp_path: Path) -> None:
    model = tiny("gpt2")
    base, before = logits(model, tokens), weights(model)
    stack = add_lora(model, ["c_attn"], modules_to_save=["ln_f"])
    moved = logits(model, tokens)
    assert any("ln_f" in key for key in stack.keys(stack["lora"]))
    with stack.disabled():
        assert torch.equal(logits(model, tokens), base)
    save_adapter(model, tmp_path)
    again = tiny("gpt2")
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again, tokens), moved)
    stack.remove("lora")
    assert same(weights(model), before) and torch.equal(logits(model, tokens), base)


def test_three_kinds_of_adapter_on_one_projection(tokens: Tensor, tmp_path: Path) -> None:
    def three() -> AdapterStack:
        stack = add_lora(tiny("llama"), ["o_proj"])
        config = IA3Config(target_modules=["o_proj"], feedforward_modules=[])
        stack.add(config, "ia3")
        for tensor in stack.tensors(stack["ia3"]).values():
            tensor.mul_(1.5)
        return add_offsets(stack.backbone)

    stack = three()
    assert [part.name for part in stack.parts] == ["lora", "ia3", "edit"]
    assert all(".base_layer" not in key for part in stack.parts for key in stack.keys(part))
    save_adapter(stack.backbone, tmp_path)
    model = tiny("llama")
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model, tokens), logits(stack.backbone, tokens))
    with stack.disabled():
        assert torch.equal(logits(stack.backbone, tokens), logits(tiny("llama"), tokens))


def test_a_tuned_adapter_belongs_below_an_edit() -> None:
    _, stack = edited("llama")
    message = r"^Adapter 'lora' is tuned and belongs below the edit 'edit': tune first, then edit\.$"
    with pytest.raises(ValueError, match=message):
        stack.add(LoraConfig(target_modules=["q_proj"]), "lora")


def test_a_name_is_given_once() -> None:
    stack = add_lora(tiny("llama"), ["q_proj"])
    with pytest.raises(ValueError, match=r"^The backbone already has an adapter named 'lora'\.$"):
        stack.add(LoraConfig(target_modules=["q_proj"]), "lora")


@pytest.mark.parametrize("name", ["a.b", "a/b", "../up", ""])
def test_a_name_must_do_for_a_folder(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"^An adapter's name consists of letters, digits, - and _, at most 100 of them, unlike '"
    ):
        stack_of(tiny("llama")).add(LoraConfig(target_modules=["q_proj"]), name)


def test_a_name_that_is_a_modules_is_an_error() -> None:
    """peft sorts tensors by adapter name: one called `self_attn` would make it drop every other adapter's tensors."""
    stack = add_lora(tiny("llama"), ["q_proj"])
    with pytest.raises(
        ValueError, match=r"^'self_attn' is the name of a module of the backbone: give the adapter anot"
    ):
        stack.add(LoraConfig(target_modules=["k_proj"]), "self_attn")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PrefixTuningConfig(num_virtual_tokens=3), "^PrefixTuningConfig is trained, and cannot be an edit"),
        (AdaptionPromptConfig(adapter_len=2, adapter_layers=1), "renames the modules it wraps, so it must be a backb"),
        (
            LoraConfig(target_modules=["q_proi"]),
            r"^No module of the backbone is called 'q_proi'; the nearest names are q",
        ),
    ],
)
def test_what_cannot_be_injected_is_one_sentence_and_leaves_the_model_alone(
    config: LoraConfig, message: str, tokens: Tensor
) -> None:
    model, stack = edited("llama")
    before, moved = weights(model), logits(model, tokens)
    with pytest.raises(ValueError, match=message):
        stack.add(config, "other", computed=True)
    assert same(weights(model), before) and torch.equal(logits(model, tokens), moved)
    assert list(model.peft_config) == ["edit"] and len(stack.parts) == 1


def test_the_configuration_given_is_not_changed() -> None:
    config = LoraConfig(target_modules=["o_proj", "q_proj"])
    before = copy.deepcopy(config)
    stack = stack_of(tiny("llama"))
    part = stack.add(config, "lora")
    assert config == before == part.config


# -- the dial -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_scale_is_a_dial(kind: str, tokens: Tensor) -> None:
    model, stack = both(kind)
    as_made = logits(model, tokens)
    stack.scale(0.0)
    assert torch.equal(logits(model, tokens), logits(tiny(kind), tokens))
    stack.scale(1.0)
    assert torch.equal(logits(model, tokens), as_made)
    stack.scale(2.0, "edit")
    stack.scale(0.0, "lora")
    assert torch.equal(logits(model, tokens), logits(edited(kind, alpha=4.0)[0], tokens))
    stack.scale(-1.0, "edit")
    assert torch.equal(logits(model, tokens), logits(edited(kind, alpha=-2.0)[0], tokens))
    assert (stack["edit"].scale, stack["lora"].scale) == (-1.0, 0.0)


def test_a_method_without_a_strength_cannot_be_scaled_and_nothing_is(tokens: Tensor) -> None:
    stack = add_lora(tiny("llama"), ["o_proj"])
    stack.add(IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "ia3")
    before = logits(stack.backbone, tokens)
    with pytest.raises(ValueError, match=r"^Adapter 'ia3' \(IA3Config\) has no dial to scale\.$"):
        stack.scale(0.0)
    assert torch.equal(logits(stack.backbone, tokens), before)


@pytest.mark.parametrize("strength", [-1.0, 0.5])
def test_the_dial_is_saved_with_the_adapter(strength: float, tokens: Tensor, tmp_path: Path) -> None:
    model, stack = both("llama")
    stack.scale(strength)
    save_adapter(model, tmp_path)
    again = tiny("llama")
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    alone = tiny("llama")
    add_lora(alone, ["o_proj"])
    stack_of(alone).scale(strength)
    by_peft = PeftModel.from_pretrained(tiny("llama"), tmp_path / "lora")
    assert torch.equal(logits(by_peft, tokens), logits(alone, tokens))


# -- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_merging_goes_from_inner_to_outer(kind: str, tokens: Tensor) -> None:
    """The edit's bias is that of the projection with LoRA in it."""
    model, stack = both(kind)
    unmerged = logits(model, tokens)
    stack.merge()
    assert close(logits(model, tokens), unmerged)
    stack.merge()  # once is enough
    assert close(logits(model, tokens), unmerged)
    stack.unmerge()
    assert close(logits(model, tokens), unmerged)


def test_merging_leaves_out_what_is_switched_off(tokens: Tensor) -> None:
    model = tiny("llama")
    add_lora(model, ["q_proj"])
    stack = add_offsets(model)
    as_made = logits(model, tokens)
    stack.enable(False, "lora")
    off = logits(model, tokens)
    stack.merge()
    attention = model.model.layers[0].self_attn
    assert attention.o_proj.merged and not attention.q_proj.merged and close(logits(model, tokens), off)
    stack.enable(True, "lora")
    assert torch.equal(logits(model, tokens), as_made)


@pytest.mark.filterwarnings("error:Already unmerged")
def test_a_merged_stack_can_still_be_scaled_switched_removed_and_saved(tokens: Tensor, tmp_path: Path) -> None:
    base, unmerged = logits(tiny("llama"), tokens), logits(both("llama")[0], tokens)
    for change in ("scale", "switch", "remove", "save"):
        model, stack = both("llama")
        stack.merge()
        if change == "scale":
            stack.scale(0.0)
        elif change == "switch":
            stack.enable(False)
        elif change == "remove":
            stack.remove("lora")
            assert close(logits(model, tokens), logits(edited("llama")[0], tokens))
            stack.remove("edit")
        else:
            save_adapter(model, tmp_path)
            loaded = tiny("llama")
            load_adapter(loaded, tmp_path)
            assert torch.equal(logits(loaded, tokens), unmerged)
            continue
        assert close(logits(model, tokens), base), change


# -- saving and loading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_a_stack_is_saved_and_loaded_bit_for_bit(kind: str, tokens: Tensor, tmp_path: Path) -> None:
    model, stack = both(kind)
    stack["edit"].record = {"method": "by hand"}
    assert save_adapter(model, tmp_path) == tmp_path
    assert json.loads((tmp_path / "stack.json").read_text()) == {"parts": ["lora", "edit"]}
    again = tiny(kind)
    parts = load_adapter(again, tmp_path)
    assert [(p.name, p.computed, p.record) for p in parts] == [
        ("lora", False, {}),
        ("edit", True, {"method": "by hand"}),
    ]
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert same(weights(again), weights(model))


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_each_part_can_be_loaded_alone_by_us_and_by_peft(kind: str, tokens: Tensor, tmp_path: Path) -> None:
    save_adapter(both(kind)[0], tmp_path)
    alone = {"lora": tiny(kind), "edit": edited(kind)[0]}
    add_lora(alone["lora"], [PROJECTIONS[kind]])
    for name, expected in alone.items():
        model = tiny(kind)
        load_adapter(model, tmp_path / name)
        assert torch.equal(logits(model, tokens), logits(expected, tokens))
        by_peft = PeftModel.from_pretrained(tiny(kind), tmp_path / name)
        assert torch.equal(logits(by_peft, tokens), logits(expected, tokens))


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_saved_keys_are_those_of_an_adapter_alone(kind: str, tmp_path: Path) -> None:
    save_adapter(both(kind)[0], tmp_path / "stack")
    lora = tiny(kind)
    add_lora(lora, [PROJECTIONS[kind]])
    for name, model in {"lora": lora, "edit": edited(kind)[0]}.items():
        save_adapter(model, tmp_path / name)
        alone = load_file(tmp_path / name / "adapter_model.safetensors")
        assert same(load_file(tmp_path / "stack" / name / "adapter_model.safetensors"), alone)


def test_a_saved_file_holds_the_adapter_and_little_else(tmp_path: Path) -> None:
    model, stack = edited("llama")
    save_adapter(model, tmp_path)
    size = sum(t.numel() * t.element_size() for t in stack.tensors(stack["edit"]).values())
    assert size <= (tmp_path / "adapter_model.safetensors").stat().st_size <= size + 1024


def test_a_single_adapter_can_be_given_a_name(tmp_path: Path) -> None:
    save_adapter(edited("llama")[0], tmp_path)
    model = tiny("llama")
    assert load_adapter(model, tmp_path, name="mine")[0].name == "mine"
    assert load_adapter(tiny("llama"), tmp_path)[0].name == "default"


def test_an_adapter_made_by_peft_alone_loads(tokens: Tensor, tmp_path: Path) -> None:
    from peft import get_peft_model

    made = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    made.save_pretrained(tmp_path)
    model = tiny("llama")
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model, tokens), logits(made, tokens))


def test_another_base_is_refused_and_left_alone(tokens: Tensor, tmp_path: Path) -> None:
    save_adapter(both("llama")[0], tmp_path)
    other = tiny("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.02)
    base, before = logits(other, tokens), weights(other)
    with pytest.raises(AdapterError, match=r"lora was made for another base model: .* hold other values: "):
        load_adapter(other, tmp_path)
    with pytest.raises(
        AdapterError, match=r"was made for another base model: their parameters have other names or sha"
    ):
        load_adapter(tiny("wide_llama"), tmp_path)
    assert same(weights(other), before) and torch.equal(logits(other, tokens), base)


def test_the_base_is_known_by_what_it_was_before_anything_was_trained(tmp_path: Path) -> None:
    """LoRA can train the backbone's own biases: the adapter must still fit the base it came from."""
    model = tiny("gpt2")
    add_lora(model, ["c_attn", "c_proj", "c_fc"], bias="all")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    save_adapter(model, tmp_path)
    load_adapter(tiny("gpt2"), tmp_path)


# -- finding the stack ----------------------------------------------------------------------------------------------


def test_the_stack_of_a_module_is_found_wherever_it_is(tokens: Tensor) -> None:
    model, stack = edited("llama")
    outer = nn.ModuleDict({"net": nn.ModuleList([model]), "other": nn.Linear(2, 2)})
    assert adapters(outer) is adapters(model) is stack
    assert find_stacks(outer) == {"net.0": stack}
    twin = copy.deepcopy(outer)
    assert adapters(twin) is not stack and adapters(twin).backbone is twin["net"][0]
    adapters(twin).scale(0.0)
    assert torch.equal(logits(twin["net"][0], tokens), logits(tiny("llama"), tokens))
    assert not torch.equal(logits(model, tokens), logits(tiny("llama"), tokens))


def test_no_adapter_or_several_backbones_are_errors() -> None:
    with pytest.raises(ValueError, match=r"^Expected adapters on one backbone in Linear, found no adapter\.$"):
        adapters(nn.Linear(2, 2))
    two = nn.ModuleDict({"a": edited("llama")[0], "b": edited("llama")[0]})
    with pytest.raises(
        ValueError, match=r"^Expected adapters on one backbone in ModuleDict, found adapters on 'a', 'b'"
    ):
        adapters(two)


def test_an_unknown_adapter_is_an_error_listing_those_there_are() -> None:
    _, stack = both("llama")
    with pytest.raises(KeyError, match="No adapter named 'x'; there are: lora, edit"):
        stack["x"]
    assert isinstance(stack, AdapterStack) and "edit" in stack and "x" not in stack


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("lora_B", LoraConfig(target_modules=["q_proj"])),
        ("head_offsets", HeadOffsetsConfig(target_modules=".*o_proj", head_dim=8, positions="all")),
        ("bottleneck_rule", BottleneckConfig(target_modules=["down_proj"], size=2, kronecker=2)),
        ("masks", WeightDeltasConfig(target_parameters=r".*q_proj\.weight")),
        ("weight_deltas", WeightDeltasConfig(target_parameters=r".*q_proj\.weight")),
        ("ssb_in", SSBConfig(target_modules=["q_proj"])),
    ],
)
def test_no_adapter_takes_the_tensors_of_another_by_its_name(name: str, config: PeftConfig) -> None:
    stack = stack_of(tiny("llama"))
    stack.add(LoraConfig(target_modules=["v_proj"]), name)
    before = stack.tensors(stack[name])
    with pytest.raises(ValueError, match=rf"^The adapter '{name}' is called as what this one keeps its tensors under"):
        stack.add(config, "other")
    assert stack.tensors(stack[name]).keys() == before.keys()
    assert [part.name for part in stack.parts] == [name]


@pytest.mark.parametrize("name", ["values", "keys", "forward"])
def test_an_adapter_cannot_have_the_name_of_a_modules_attribute(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^'{name}' is the name of an attribute of every module"):
        stack_of(tiny("llama")).add(LoraConfig(target_modules=["q_proj"]), name)
