"""Layer offsets add to outputs or take a direction out of them, are nothing at zero, and become weights where exact."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import add_lora, close, fill, logits
from layer_edits import KINDS, add_layer_offsets, edited, inputs, logits_of
from peft import PeftModel, get_peft_model
from tiny_models import LANGUAGE_MODELS, tiny
from torch import Tensor, nn

from lightning_peft.editing import head_offsets_config, head_sites, layer_offsets_config, layer_sites, stream_writers
from lightning_peft.positions import answering, policies
from lightning_peft.stack.adapter_files.merging import merge_pretrained
from lightning_peft.stack.adapter_files.saving import load_adapter, save_adapter
from lightning_peft.stack.stack import stack_of
from lightning_peft.testing.models import rough
from lightning_peft.tuners.layer_offsets import LayerOffsetsConfig, LayerOffsetsLayer

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out", "ignore:.*gradient_checkpointing", "ignore:Unsupported layer type"
)
SITES = ("block", "attention", "mlp")
DECODERS = ("llama", "gpt2", "gpt_neox", "opt")
START = torch.tensor([2, 4, 8])


def vectors_of(model: nn.Module) -> dict[str, Tensor]:
    """Each edited module's vectors, by the module's name."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LayerOffsetsLayer)]
    return {name.rpartition(".")[0]: layer.layer_offsets["edit"].detach() for name, layer in layers}


def by_hand(kind: str, vectors: dict[str, Tensor], change: Any, **given: Any) -> Tensor:
    """The logits of a model whose modules' outputs are changed by plain hooks."""
    model = rough(kind)
    for name, vector in vectors.items():

        def hook(_: Any, __: Any, output: Any, v: Tensor = vector) -> Any:
            return change(output, v) if isinstance(output, Tensor) else (change(output[0], v), *output[1:])

        model.get_submodule(name).register_forward_hook(hook)
    return logits_of(model, kind, **given)


# -- what they do ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sites", SITES)
def test_outputs_move_by_alpha_times_the_vector(kind: str, sites: str) -> None:
    model, _ = edited(kind, sites, alpha=0.5)
    expected = by_hand(kind, vectors_of(model), lambda x, v: x + 0.5 * v[0])
    assert close(logits_of(model, kind), expected) and not close(expected, logits_of(rough(kind), kind), 1e-3)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("positions", ["answer", "generated", "prompt", "answer[0:2]"])
def test_only_the_positions_of_the_policy_move(kind: str, positions: str) -> None:
    model, _ = edited(kind, positions=positions)
    step, first = torch.arange(9).expand(3, 9), START[:, None]
    where = {
        "answer": step >= first,
        "generated": step > first,
        "prompt": step <= first,
        "answer[0:2]": (step >= first) & (step < first + 2),
    }[positions]
    with answering(model, start=START):
        found = logits_of(model, kind)
    assert close(found, by_hand(kind, vectors_of(model), lambda x, v: x + where[..., None] * 2.0 * v[0]))


def test_what_follows_in_a_tuple_is_left_alone() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x, "kept"

    model = nn.Sequential(Two())
    stack = stack_of(model)
    stack.add(LayerOffsetsConfig(target_modules=["0"], width=4, positions="all"), "edit", computed=True)
    fill(stack, "edit")
    moved, kept = model(torch.zeros(2, 3, 4))
    assert kept == "kept" and torch.equal(moved, vectors_of(model)["0"].expand(2, 3, 4))


@pytest.mark.parametrize("operation", ["add", "ablate"])
@pytest.mark.parametrize("kind", KINDS)
def test_strength_zero_and_off_are_the_base_bit_for_bit(kind: str, operation: str) -> None:
    model, stack = edited(kind, operation=operation)
    base, moved = logits_of(rough(kind), kind), logits_of(model, kind)
    assert not close(moved, base, 1e-3)
    stack.scale(0.0)
    assert torch.equal(logits_of(model, kind), base)
    stack.scale(1.0)
    assert torch.equal(logits_of(model, kind), moved)
    with stack.disabled():
        assert torch.equal(logits_of(model, kind), base)
    stack.remove("edit")
    assert torch.equal(logits_of(model, kind), base) and not [m for m in model.modules() if m._forward_hooks != {}][1:]


@pytest.mark.parametrize("strength", [-1.0, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", DECODERS)
def test_an_ablation_leaves_one_minus_its_strength_of_the_direction(kind: str, strength: float) -> None:
    model, stack = edited(kind, layers=slice(1, 2), operation="ablate", alpha=1.0)
    ((name, vector),) = vectors_of(model).items()
    d = vector[0] / vector[0].norm()
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    for factor in (0.0, strength):
        stack.scale(factor)
        logits_of(model, kind)
    hook.remove()
    before, after = seen
    torch.testing.assert_close(after @ d, (1 - strength) * (before @ d), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after - (after @ d)[..., None] * d, before - (before @ d)[..., None] * d)


def test_a_zero_direction_ablates_nothing(tokens: Tensor) -> None:
    model = tiny("llama")
    base = logits(model, tokens)
    config = layer_offsets_config(layer_sites(model), positions="all", operation="ablate")
    stack_of(model).add(config, "edit", computed=True)
    assert torch.equal(logits(model, tokens), base)


def test_a_vector_for_each_of_the_first_tokens(tokens: Tensor) -> None:
    """Each token of the front has its own, and in a padded row the front is the text's."""
    model, _ = edited("llama", tokens=3)
    place = torch.arange(9)[:, None]

    def change(x: Tensor, v: Tensor) -> Tensor:
        return x + 2.0 * torch.where(place < 3, v[place[:, 0].clamp(max=2)], torch.zeros(()))

    alone = logits_of(model, "llama")
    assert close(alone, by_hand("llama", vectors_of(model), change))
    ids = inputs("llama")["input_ids"]
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), ids], 1)
    mask = (torch.arange(11) >= 2).long().expand(3, 11)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    assert close(logits(model, padded, attention_mask=mask, position_ids=places)[:, 2:], alone)


def test_a_mask_does_not_say_which_token_gets_which_vector(tokens: Tensor) -> None:
    model, _ = edited("llama", tokens=3)
    with (
        answering(model, mask=torch.ones(3, 9, dtype=torch.bool)),
        pytest.raises(ValueError, match=r"^Adapter 'edit' has a vector for each of 3 tokens, and a mask does not say "),
    ):
        logits(model, tokens)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize(("positions", "tokens"), [("all", 1), ("answer", 1), ("all", 7)])
def test_generation_with_a_cache_is_generation_without(kind: str, positions: str, tokens: int) -> None:
    model, _ = edited(kind, positions=positions, tokens=tokens)
    ids, mask = inputs(kind)["input_ids"].clone(), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4], ids[1, :4] = 0, 0
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**given, use_cache=True), model.generate(**given, use_cache=False))
    assert not torch.equal(model.generate(**given), rough(kind).generate(**given))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_vectors_train_from_zero_and_nothing_else_moves(checkpointing: bool, tokens: Tensor) -> None:
    model: Any = tiny("llama")
    stack = stack_of(model)
    part = stack.add(layer_offsets_config(layer_sites(model)), "trained")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    labels, losses = tokens.masked_fill(torch.arange(9) < 4, -100), []
    for _ in range(5):
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1 and all(t.abs().min() > 0 for t in stack.tensors(part).values())
    stack.remove("trained")
    assert all(torch.equal(value, tiny("llama").state_dict()[name]) for name, value in model.state_dict().items())


# -- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sites", SITES)
def test_merged_equals_unmerged_where_it_is_exact(kind: str, sites: str) -> None:
    """Everywhere but behind a block that normalises its sum."""
    model, stack = edited(kind, sites)
    unmerged = logits_of(model, kind)
    if (kind, sites) == ("bert", "block"):
        with pytest.raises(
            ValueError, match=r"^An offset of bert\.encoder\.layer\.0 cannot be merged: no bias in the B"
        ):
            stack.merge()
    else:
        stack.merge()
        assert close(logits_of(model, kind), unmerged)
    stack.unmerge()
    assert torch.equal(logits_of(model, kind), unmerged)


@pytest.mark.parametrize("kind", ["gemma2", "olmo2"])
def test_a_block_that_normalises_its_parts_is_refused_and_its_matrices_are_not(kind: str, tokens: Tensor) -> None:
    import transformers as t

    common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    made = {
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**common, head_dim=8)),
        "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**common)),
    }
    model = made[kind]().eval()
    add_layer_offsets(model)
    with pytest.raises(ValueError, match=r"^An offset of model\.layers\.0 cannot be merged: no bias in the "):
        stack_of(model).merge()
    stack_of(model).remove("edit")
    add_layer_offsets(model, "mlp")
    unmerged = logits(model, tokens)
    stack_of(model).merge()
    assert close(logits(model, tokens), unmerged)


@pytest.mark.parametrize("kind", DECODERS)
def test_ablating_all_that_writes_clears_the_stream_and_is_one_of_weights(kind: str) -> None:
    """Of every block's output nothing is left along the direction, by hooks as by weights; tied weights come back."""
    model: Any = rough(kind)
    names = stream_writers(model)
    config = LayerOffsetsConfig(target_modules=names, width=32, operation="ablate", positions="all")
    stack = stack_of(model)
    part = stack.add(config, "edit", computed=True)
    d = torch.randn(32, generator=torch.Generator().manual_seed(1))
    for tensor in stack.tensors(part).values():
        tensor.copy_(d)
    left: list[float] = []

    def measure(_: Any, __: Any, output: Any) -> None:
        left.append(float(((output if isinstance(output, Tensor) else output[0]) @ d).abs().max()))

    for site in layer_sites(model):
        model.get_submodule(site.name).register_forward_hook(measure)
    unmerged = logits_of(model, kind)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    stack.merge()
    assert close(logits_of(model, kind), unmerged) and len(left) == 6 and max(left) < 1e-4
    stack.unmerge()
    assert tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    assert torch.equal(logits_of(model, kind), unmerged)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "answer"}, r"^Adapter 'edit' edits only 'answer' positions; a bias acts at every one, so only "),
        ({"tokens": 2}, r"^Adapter 'edit' edits only 'all\[0:1\]' positions"),
        (
            {"operation": "ablate"},
            r"^An ablation of model\.layers\.0 cannot be merged: a direction is taken out of plain",
        ),
    ],
)
def test_what_is_not_weights_is_not_merged(options: dict[str, Any], message: str) -> None:
    model, stack = edited("llama", **options)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        stack.merge()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_an_offset_behind_an_ablation_of_the_same_matrix_is_not_one_of_its_bias() -> None:
    """The bias would be ablated too: it is tried, not assumed. Alone the ablation can be merged."""
    model = rough("llama")
    stack = stack_of(model)
    config = LayerOffsetsConfig(target_modules=["down_proj"], width=32, operation="ablate", positions="all")
    stack.add(config, "ablation", computed=True)
    fill(stack, "ablation")
    stack.merge()
    add_layer_offsets(model, "block")
    with pytest.raises(ValueError, match=r"^An offset of model\.layers\.0 cannot be merged"):
        stack.merge()


@pytest.mark.parametrize("operation", ["add", "ablate"])
def test_a_four_bit_base_takes_a_bias_and_no_ablation(operation: str, tokens: Tensor) -> None:
    pytest.importorskip("bitsandbytes")
    from lightning_peft.backbone.quantization import quantize

    model = tiny("llama")
    quantize(model)
    add_layer_offsets(model, "attention", operation=operation)
    unmerged = logits(model, tokens)
    if operation == "add":
        stack_of(model).merge()
        assert close(logits(model, tokens), unmerged, 1e-4)
    else:
        with pytest.raises(ValueError, match=r"is taken out of plain matrices and embeddings, not of a Linear4bit"):
            stack_of(model).merge()


def test_offsets_that_overflow_are_not_merged() -> None:
    _, stack = edited("llama", "mlp")
    stack.tensors(stack["edit"]).popitem()[1].fill_(float("inf"))
    with pytest.raises(ValueError, match=r"^NaNs detected in the merged weights\. The adapter edit seems to be broken"):
        stack.merge()


@pytest.mark.parametrize(("kind", "sites"), [("gpt2", "block"), ("opt", "mlp"), ("gpt_neox", "writes")])
def test_a_merged_folder_is_plain_transformers(kind: str, sites: str, tmp_path: Path, tokens: Tensor) -> None:
    from transformers import AutoModelForCausalLM

    rough(kind).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if sites == "writes":
        names = stream_writers(model)
        config = LayerOffsetsConfig(target_modules=names, width=32, operation="ablate", positions="all")
        stack_of(model).add(config, "edit", computed=True)
        fill(stack_of(model), "edit")
    else:
        add_layer_offsets(model, sites)
    save_adapter(model, tmp_path / "adapter")
    merge_pretrained(tmp_path / "adapter", tmp_path / "merged", str(tmp_path / "base"))
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tokens), logits(model, tokens))


# -- with other adapters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", SITES)
def test_an_edited_model_takes_head_offsets_and_keeps_its_names(sites: str, tokens: Tensor) -> None:
    model, stack = edited("llama", sites)
    assert [site.name for site in head_sites(model)] == [site.name for site in head_sites(tiny("llama"))]
    assert layer_sites(model) == layer_sites(tiny("llama"))
    assert stack["edit"].injection.places() == [site.name for site in layer_sites(model, sites)]
    stack.add(head_offsets_config(head_sites(model), positions="all"), "heads", computed=True)
    fill(stack, "heads", seed=9)
    both = logits(model, tokens)
    stack.merge()
    assert close(logits(model, tokens), both)
    stack.unmerge()
    stack.remove("edit")
    alone = rough("llama")
    stack_of(alone).add(head_offsets_config(head_sites(alone), positions="all"), "heads", computed=True)
    fill(stack_of(alone), "heads", seed=9)
    assert torch.equal(logits(model, tokens), logits(alone, tokens))


@pytest.mark.parametrize("operation", ["add", "ablate"])
def test_an_edit_on_top_of_lora_stays_when_lora_goes(operation: str, tokens: Tensor) -> None:
    model = rough("llama")
    add_lora(model, ["o_proj", "down_proj"])
    add_layer_offsets(model, "attention", operation=operation)
    merged = copy.deepcopy(model)
    stack_of(merged).merge()
    assert close(logits(merged, tokens), logits(model, tokens))
    stack_of(model).remove("lora")
    alone, _ = edited("llama", "attention", operation=operation)
    assert torch.equal(logits(model, tokens), logits(alone, tokens))
    stack_of(model).scale(0.0)
    assert torch.equal(logits(model, tokens), logits(rough("llama"), tokens))


# -- as any peft adapter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"operation": "ablate"}], ids=["add", "ablate"])
def test_peft_loads_a_saved_edit_bit_for_bit(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, _ = edited(kind, **options)
    save_adapter(model, tmp_path)
    loaded: Any = PeftModel.from_pretrained(rough(kind), tmp_path)
    again = rough(kind)
    load_adapter(again, tmp_path)
    assert torch.equal(logits_of(loaded, kind), logits_of(model, kind))
    assert torch.equal(logits_of(again, kind), logits_of(model, kind))
    with loaded.disable_adapter():
        assert torch.equal(logits_of(loaded, kind), logits_of(rough(kind), kind))


def test_peft_saves_and_merges_it_itself(tmp_path: Path) -> None:
    model = get_peft_model(rough("gpt2"), layer_offsets_config(layer_sites(tiny("gpt2")), 2.0, "all"))
    for name, parameter in model.named_parameters():
        if "layer_offsets" in name:
            nn.init.normal_(parameter)
    expected = logits_of(model, "gpt2")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(rough("gpt2"), tmp_path), "gpt2"), expected)
    merged = model.merge_and_unload()
    assert not [m for m in merged.modules() if isinstance(m, LayerOffsetsLayer)]
    assert close(logits_of(merged, "gpt2"), expected)
    assert merged.state_dict().keys() == tiny("gpt2").state_dict().keys()


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    model, stack = edited("llama", positions="answer")
    twin = copy.deepcopy(model)
    with answering(twin, start=START):
        expected = logits_of(twin, "llama")
    stack.scale(-3.0)
    with answering(twin, start=START):
        assert torch.equal(logits_of(twin, "llama"), expected)
    stack_of(twin).scale(0.0)
    assert torch.equal(logits_of(twin, "llama"), logits_of(rough("llama"), "llama"))


@pytest.mark.slow
def test_an_edited_model_can_be_compiled(tokens: Tensor) -> None:
    model, _ = edited("llama")
    assert close(logits(torch.compile(model, backend="eager"), tokens), logits(model, tokens))


# -- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operation": "double"}, r'^operation must be "add" or "ablate", got \'double\'\.$'),
        ({"positions": "some"}, r"^positions must be one of all, prompt, .*got 'some'\.$"),
        ({"tokens": 0}, r"^tokens=0 vectors need to be added at the beginning of one of all, .*not at 'answer'\.$"),
        ({"tokens": 2, "positions": "answer[1:]"}, r"^tokens=2 vectors .*, not at 'answer\[1:\]'\.$"),
        ({"tokens": 2, "operation": "ablate"}, r"^tokens=2 vectors .*, not ablated\.$"),
        ({"gate": "some"}, r"^gate must be None, 'adaptive' or 'conditional', got 'some'\.$"),
        ({"gate": "conditional", "threshold": 1.0}, r"^threshold must be between 0 and 1, got 1\.0\.$"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerOffsetsConfig(target_modules=["x"], width=4, **options)


def test_a_configuration_without_targets_says_how_to_find_them() -> None:
    with pytest.raises(
        ValueError, match=r"^LayerOffsetsConfig needs target_modules and width; lightning_peft\.editing"
    ):
        stack_of(tiny("llama")).add(LayerOffsetsConfig(), "edit", computed=True)


def test_another_width_than_the_modules_is_one_sentence(tokens: Tensor) -> None:
    model = tiny("llama")
    config = LayerOffsetsConfig(target_modules=["model.layers.1"], width=16, positions="all")
    stack_of(model).add(config, "edit", computed=True)
    with pytest.raises(
        ValueError, match=r"^model\.layers\.1 gives 32 features, but adapter 'edit' was made for width=16"
    ):
        logits(model, tokens)


def test_a_module_that_is_never_called_is_refused() -> None:
    """A block that is but a dictionary of modules."""
    model = tiny("hand_written")
    with pytest.raises(
        ValueError, match=r"^blocks\.0 is a ModuleDict, which is never called and gives nothing to add "
    ):
        add_layer_offsets(model)
    assert not stack_of(model).parts and not [m for m in model.modules() if isinstance(m, LayerOffsetsLayer)]


def test_a_full_name_means_that_module_alone() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ModuleDict({"a": nn.Linear(4, 4)})})
    stack_of(model).add(LayerOffsetsConfig(target_modules=["a"], width=4), "edit", computed=True)
    assert list(vectors_of(model)) == ["a"]


def test_finding_out_what_a_merge_may_write_does_not_warn_of_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "_warned", False)
    _, stack = edited("gpt2", positions="answer")
    with warnings.catch_warnings():
        warnings.simplefilter("error", policies.PlainTextWarning)
        with pytest.raises(ValueError, match="edits only 'answer' positions"):
            stack.merge()
