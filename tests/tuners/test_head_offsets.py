"""Head offsets add `alpha * offset` to chosen heads, are nothing at zero, and become a bias where they act always."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from edits import HEADS, PROJECTIONS, add_lora, add_offsets, both, close, edited, fill, logits
from peft import PeftConfig, PeftModel, get_peft_model
from tiny_models import LANGUAGE_MODELS, tiny
from torch import Tensor, nn

from lightning_peft.editing import head_offsets_config, head_sites
from lightning_peft.positions import POLICIES, answering
from lightning_peft.stack.adapter_files.saving import save_adapter
from lightning_peft.stack.configs import config_from_json, config_to_json
from lightning_peft.stack.stack import stack_of
from lightning_peft.testing.models import rough
from lightning_peft.tuners.head_offsets import HeadOffsetsConfig, HeadOffsetsLayer

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out",
    "ignore:.*gradient_checkpointing",
    "ignore:Unsupported layer type",
)
O_PROJ = "model.layers.{}.self_attn.o_proj"


def offset_layers(model: nn.Module) -> list[HeadOffsetsLayer]:
    return [module for module in model.modules() if isinstance(module, HeadOffsetsLayer)]


# -- what they do ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("positions", POLICIES)
def test_zero_offsets_are_the_identity_bit_for_bit(kind: str, positions: str, tokens: Tensor) -> None:
    model = tiny(kind)
    base = logits(model, tokens)
    stack_of(model).add(head_offsets_config(head_sites(model), positions=positions), "edit", computed=True)
    assert torch.equal(logits(model, tokens), base)


@pytest.mark.parametrize("positions", POLICIES)
def test_strength_zero_is_the_identity_although_offsets_are_not_zero(positions: str, tokens: Tensor) -> None:
    model = tiny("llama")
    base = logits(model, tokens)
    stack = add_offsets(model, positions, alpha=0.0)
    assert torch.equal(logits(model, tokens), base)
    assert all(float(t.abs().min()) > 0 for t in stack.tensors(stack["edit"]).values())
    model, stack = edited("llama", positions)
    stack.scale(0.0)
    assert torch.equal(logits(model, tokens), base)
    with torch.no_grad():  # the trunk alone says nothing of positions, and at strength 0 nobody asks
        assert torch.equal(model.model(tokens)[0], tiny("llama").model(tokens)[0])


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("positions", POLICIES)
def test_the_projections_input_moves_by_alpha_times_the_offset_where_the_policy_says(
    kind: str, positions: str, tokens: Tensor
) -> None:
    model, stack = edited(kind, positions, alpha=3.0)
    layer = offset_layers(model)[0]  # the first layer has only head 1, and nothing before it is edited
    seen: list[Tensor] = []
    layer.base_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(3, 9, 4, -1)))
    with answering(model, start=torch.tensor([0, 4, 8])):
        logits(model, tokens)
        with stack.disabled():
            logits(model, tokens)
    moved = seen[0] - seen[1]
    offset = 3.0 * layer.head_offsets["edit"].detach()[0]
    step = torch.arange(9)
    first = torch.tensor([[0], [4], [8]])
    where = {"all": step.expand(3, 9) >= 0, "answer": step >= first, "generated": step > first}[positions]
    expected = torch.zeros_like(moved)
    expected[:, :, 1] = where[..., None] * offset
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)
    assert not moved[:, :, [0, 2, 3]].any()


def test_a_bfloat16_model_is_edited_in_bfloat16(tokens: Tensor) -> None:
    model = tiny("llama").bfloat16()
    base = logits(model, tokens)
    add_offsets(model)
    assert offset_layers(model)[0].head_offsets["edit"].dtype == torch.float32
    moved = logits(model, tokens)
    assert moved.dtype == torch.bfloat16 and not torch.equal(moved, base)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_number_of_parameters_is_heads_times_head_dim(kind: str) -> None:
    model, _ = edited(kind)
    width = 16 if kind == "wide_llama" else 8
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == len(HEADS) * width


def test_two_edits_on_the_same_heads_add_up(tokens: Tensor) -> None:
    model, stack = edited("llama")
    add_offsets(model, name="second")
    fill(stack, "second", seed=3)  # the same offsets again
    twice, _ = edited("llama", alpha=4.0)
    torch.testing.assert_close(logits(model, tokens), logits(twice, tokens), atol=1e-4, rtol=1e-4)
    stack.remove("second")
    assert torch.equal(logits(model, tokens), logits(edited("llama")[0], tokens))


# -- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)  # Linear without bias, Conv1D, Linear with bias
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "on LoRA"])
def test_merged_equals_unmerged_and_unmerging_is_exact(kind: str, wrapped: bool, tokens: Tensor) -> None:
    model = rough(kind)
    if wrapped:
        add_lora(model, [PROJECTIONS[kind]])
    stack = add_offsets(model)
    unmerged = logits(model, tokens)
    biases = [layer.get_base_layer().bias for layer in offset_layers(model)]
    before = [None if bias is None else bias.clone() for bias in biases]
    stack.merge()
    assert all(layer.merged for layer in offset_layers(model))
    merged = logits(model, tokens)
    assert close(merged, unmerged) and not torch.equal(merged, unmerged)
    stack.unmerge()
    for layer, bias in zip(offset_layers(model), before, strict=True):
        now = layer.get_base_layer().bias
        assert (now is None and bias is None) or torch.equal(now, bias)
    if wrapped:  # peft takes LoRA out by subtraction
        assert close(logits(model, tokens), unmerged)
    else:
        assert torch.equal(logits(model, tokens), unmerged)


def test_a_merged_model_without_its_wrappers_is_the_edited_model(tokens: Tensor, tmp_path: Path) -> None:
    """Baked: saved by transformers with the bias in place, it needs this package no more."""
    from transformers import AutoModelForCausalLM

    model, stack = edited("opt")
    unmerged = logits(model, tokens)
    stack.merge()
    state = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "head_offsets" not in k}
    plain = tiny("opt")
    plain.load_state_dict(state)
    plain.save_pretrained(tmp_path)
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), unmerged)


@pytest.mark.parametrize("positions", ["answer", "generated"])
def test_an_edit_of_some_positions_cannot_be_merged(positions: str, tokens: Tensor) -> None:
    model, stack = both("llama", positions)
    before = logits(model, tokens)
    weights = copy.deepcopy(model.state_dict())
    message = (
        rf"^Adapter 'edit' edits only '{positions}' positions; a bias acts at every one, so only positions=\"all\" "
    )
    with pytest.raises(ValueError, match=message):
        stack.merge()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, tokens), before)


def test_a_projection_without_a_place_for_a_bias_cannot_be_merged(tokens: Tensor) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 32, 32
            self.weight = nn.Parameter(torch.eye(32))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    model = tiny("llama")
    model.model.layers[0].self_attn.o_proj = Bare()
    with pytest.raises(
        ValueError, match=r"^model\.layers\.0\.self_attn\.o_proj is a Bare, which may be the output proj"
    ):
        head_sites(model)
    stack = stack_of(model)
    stack.add(head_offsets_config(head_sites(model, "o_proj"), HEADS, 2.0, "all"), "edit", computed=True)
    fill(stack, "edit")
    logits(model, tokens)
    with pytest.raises(ValueError, match=r"^Cannot merge head offsets into Bare: it has no place for a bias\.$"):
        stack.merge()


def test_offsets_that_overflow_are_not_merged() -> None:
    model, stack = edited("llama")
    stack.tensors(stack["edit"]).popitem()[1].fill_(float("inf"))
    with pytest.raises(
        ValueError, match=r"^NaNs detected in the merged weights\. The adapter edit seems to be broken: "
    ):
        stack.merge()
    assert not any(layer.merged for layer in offset_layers(model))


# -- quantised bases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_4_bit_base_can_be_edited_and_merged(kind: str, tokens: Tensor) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny(kind)
    sites = head_sites(model)
    for site in sites:
        parent = model.get_submodule(site.name.rsplit(".", 1)[0])
        linear = model.get_submodule(site.name)
        quantised = bnb.nn.Linear4bit(32, 32, bias=linear.bias is not None, quant_type="nf4")
        quantised.load_state_dict(linear.state_dict())
        setattr(parent, site.name.rsplit(".", 1)[1], quantised.to("cpu"))
    base = logits(model, tokens)
    stack = add_offsets(model)
    moved = logits(model, tokens)
    assert not torch.equal(moved, base)
    with stack.disabled():
        assert torch.equal(logits(model, tokens), base)
    stack.merge()
    assert close(logits(model, tokens), moved, 1e-4)


# -- configuration --------------------------------------------------------------------------------------------------


def test_the_configuration_survives_json_and_a_folder(tmp_path: Path) -> None:
    config = HeadOffsetsConfig(heads={O_PROJ.format(1): [0, 2]}, head_dim=8, alpha=2.5, positions="generated")
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config


def test_an_unknown_policy_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^positions must be one of all, prompt, answer, .*got 'some'\.$"):
        HeadOffsetsConfig(head_dim=8, positions="some")


def test_an_unknown_head_is_an_error_and_leaves_the_model_alone(tokens: Tensor) -> None:
    model = tiny("llama")
    base = logits(model, tokens)
    config = HeadOffsetsConfig(heads={O_PROJ.format(0): [1], O_PROJ.format(2): [1, 4]}, head_dim=8)
    with pytest.raises(
        ValueError, match=r"layers\.2\.self_attn\.o_proj has heads 0 to 3, but heads \[1, 4\] were asked"
    ):
        stack_of(model).add(config, "edit", computed=True)
    assert not offset_layers(model) and not hasattr(model, "peft_config") and not stack_of(model).parts
    assert torch.equal(logits(model, tokens), base)


def test_a_head_given_twice_is_an_error() -> None:
    config = HeadOffsetsConfig(heads={O_PROJ.format(0): [1, 1]}, head_dim=8)
    with pytest.raises(ValueError, match=r"has heads 0 to 3, but heads \[1, 1\] were asked for\.$"):
        stack_of(tiny("llama")).add(config, "edit", computed=True)


def test_an_unknown_module_is_an_error() -> None:
    config = HeadOffsetsConfig(heads={O_PROJ.format(0): [1], O_PROJ.format(9): [1]}, head_dim=8)
    with pytest.raises(
        ValueError, match=r"^No module of the backbone is called 'model\.layers\.9\.self_attn\.o_proj'; "
    ):
        stack_of(tiny("llama")).add(config, "edit", computed=True)
    with pytest.raises(
        ValueError, match=r"^The model has no module 'model\.layers\.9\.self_attn\.o_proj', whose heads "
    ):
        get_peft_model(tiny("llama"), config)


def test_a_module_that_holds_no_heads_of_that_size_is_an_error() -> None:
    config = HeadOffsetsConfig(target_modules=["down_proj"], head_dim=9)
    with pytest.raises(
        ValueError, match=r"down_proj takes 48 features, which is not a multiple of head_dim=9: it is not"
    ):
        stack_of(tiny("llama")).add(config, "edit", computed=True)


def test_a_configuration_without_targets_says_how_to_find_them() -> None:
    with pytest.raises(
        ValueError, match=r"^HeadOffsetsConfig needs target_modules \(or heads\) and head_dim; lightning"
    ):
        stack_of(tiny("llama")).add(HeadOffsetsConfig(), "edit", computed=True)


def test_a_head_is_given_by_its_projections_full_name() -> None:
    """Another module whose name ends alike is not edited."""
    model = nn.ModuleDict({"attn": nn.Linear(8, 8), "outer": nn.ModuleDict({"attn": nn.Linear(8, 8)})})
    stack_of(model).add(HeadOffsetsConfig(heads={"attn": [1]}, head_dim=4), "edit", computed=True)
    assert isinstance(model["attn"], HeadOffsetsLayer) and isinstance(model["outer"]["attn"], nn.Linear)


# -- training -------------------------------------------------------------------------------------------------------


def trained(
    checkpointing: bool, tokens: Tensor, kind: str = "llama"
) -> tuple[nn.Module, list[float], dict[str, Tensor]]:
    """Ten steps of LoFiT's second stage, from zero: the model, the losses and the offsets."""
    model = tiny(kind)
    stack = stack_of(model)
    part = stack.add(head_offsets_config(head_sites(model), HEADS, positions="answer"), "lofit")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    labels = tokens.masked_fill(torch.arange(9) < 4, -100)
    losses = []
    for _ in range(10):
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, losses, {key: value.clone() for key, value in stack.tensors(part).items()}


def test_offsets_train_from_zero_and_nothing_else_moves(tokens: Tensor) -> None:
    model, losses, offsets = trained(False, tokens)
    assert losses[-1] < losses[0] - 0.05
    assert len(offsets) == 3 and all(float(value.abs().min()) > 0 for value in offsets.values())
    stack_of(model).remove("lofit")
    before = tiny("llama").state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "opt"])  # gpt2's dropout draws differently
def test_gradient_checkpointing_trains_the_same_offsets(kind: str, tokens: Tensor) -> None:
    plain, checkpointed = trained(False, tokens, kind), trained(True, tokens, kind)
    assert checkpointed[0].is_gradient_checkpointing and checkpointed[1] == pytest.approx(plain[1], rel=1e-5)
    for key, value in plain[2].items():
        torch.testing.assert_close(checkpointed[2][key], value, atol=1e-5, rtol=1e-4)


def test_a_checkpointed_block_run_again_sees_its_own_calls_positions(tokens: Tensor) -> None:
    """Two forward passes before one backward pass, as preference losses make them."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny("llama")
        stack = stack_of(model)
        part = stack.add(head_offsets_config(head_sites(model), HEADS, positions="answer"), "lofit")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with answering(model, start=torch.tensor([1, 2, 3])):
            first = model(input_ids=tokens, use_cache=False).logits
        with answering(model, start=torch.tensor([7, 8])):
            second = model(input_ids=tokens[:2], use_cache=False).logits
        (first.square().mean() - second.square().mean()).backward()
        gradients.append({k: model.get_parameter(name).grad for k, name in stack.keys(part).items()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-6, rtol=1e-4)


# -- as any peft adapter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_peft_loads_a_saved_edit_bit_for_bit(kind: str, tokens: Tensor, tmp_path: Path) -> None:
    model, _ = edited(kind, "answer")
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path)
    labels = tokens.masked_fill(torch.arange(9) < 4, -100)
    assert torch.equal(logits(loaded, tokens, labels=labels), logits(model, tokens, labels=labels))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, tokens), logits(tiny(kind), tokens))


def test_a_peft_model_generates_as_the_stack_does(tokens: Tensor, tmp_path: Path) -> None:
    model, _ = edited("llama", "answer", alpha=4.0)
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "do_sample": False}
    made = model.generate(input_ids=tokens, **options)
    assert torch.equal(loaded.generate(input_ids=tokens, **options), made)
    assert not torch.equal(tiny("llama").generate(input_ids=tokens, **options), made)


def test_peft_saves_and_merges_it_itself(tokens: Tensor, tmp_path: Path) -> None:
    config = head_offsets_config(head_sites(tiny("gpt2")), HEADS, 2.0, "all")
    model = get_peft_model(tiny("gpt2"), config)
    for name, parameter in model.named_parameters():
        if "head_offsets" in name:
            nn.init.normal_(parameter)
    edited_logits = logits(model, tokens)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("gpt2"), tmp_path), tokens), edited_logits)
    merged = model.merge_and_unload()
    assert not offset_layers(merged) and close(logits(merged, tokens), edited_logits)


def test_peft_refuses_to_merge_an_edit_of_answers() -> None:
    model = get_peft_model(tiny("gpt2"), head_offsets_config(head_sites(tiny("gpt2")), HEADS, 2.0, "answer"))
    with pytest.raises(ValueError, match=r"^Adapter 'default' edits only 'answer' positions"):
        model.merge_and_unload()


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_a_deep_copy_is_a_model_of_its_own(kind: str, tokens: Tensor) -> None:
    model, stack = edited(kind, "answer")
    twin = copy.deepcopy(model)
    with answering(twin, start=torch.tensor([4, 4, 4])):
        expected = logits(twin, tokens)
    stack.scale(-3.0)
    with answering(twin, start=torch.tensor([4, 4, 4])):
        assert torch.equal(logits(twin, tokens), expected)
    stack_of(twin).scale(0.0)
    assert torch.equal(logits(twin, tokens), logits(tiny(kind), tokens))
    assert not torch.equal(logits(model, tokens), logits(tiny(kind), tokens))


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("positions", ["all", "answer"])
def test_a_call_that_continues_a_cached_past_computes_the_same_as_one_call(
    kind: str, positions: str, tokens: Tensor
) -> None:
    model, _ = edited(kind, positions)
    with torch.no_grad(), answering(model, start=torch.tensor([3, 3, 3])):
        whole = model(input_ids=tokens).logits
        past = model(input_ids=tokens[:, :5], use_cache=True)
        rest = model(input_ids=tokens[:, 5:], past_key_values=past.past_key_values)
    assert close(torch.cat([past.logits, rest.logits], 1), whole)


# -- what is kept within a call of generate -------------------------------------------------------------------------


def scores(model: nn.Module, tokens: Tensor, **options: object) -> Tensor:
    made = model.generate(  # type: ignore[operator]
        tokens[:2, :4],
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(made.logits)


def test_what_changes_between_two_calls_of_generate_is_seen(tokens: Tensor) -> None:
    model, stack = edited("llama", "answer")
    before = scores(model, tokens)
    stack.scale(2.0)
    twice = scores(model, tokens)
    assert torch.equal(twice, scores(edited("llama", "answer", alpha=4.0)[0], tokens))
    stack.scale(1.0)
    fill(stack, "edit", size=2.0)
    torch.testing.assert_close(scores(model, tokens), twice, atol=1e-5, rtol=1e-5)
    fill(stack, "edit")
    assert torch.equal(scores(model, tokens), before)


def test_what_changes_within_a_call_of_generate_is_seen(tokens: Tensor) -> None:
    """A dial that is turned after the prompt, as a logits processor may."""
    model, stack = edited("llama", "answer")

    def turn(ids: Tensor, logits: Tensor) -> Tensor:
        stack.scale(0.0)
        return logits

    turned = scores(model, tokens, logits_processor=[turn])
    stack.scale(1.0)
    whole = scores(model, tokens)
    assert torch.equal(turned[0], whole[0]) and not torch.equal(turned[1], whole[1])


@pytest.mark.parametrize("positions", ["answer", "generated", "answer[0:3]", "generated[1:2]", "prompt[-2:]"])
def test_generating_is_scoring_what_was_generated(positions: str, tokens: Tensor) -> None:
    model, _ = edited("llama", positions)
    prompt = tokens[:2, :4]
    ids = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)  # type: ignore[operator]
    with answering(model, start=torch.tensor([3, 3])):
        scored = logits(model, ids)[:, 3:-1].transpose(0, 1)
    torch.testing.assert_close(scores(model, tokens), scored, atol=1e-5, rtol=1e-5)
