"""A gate sets the strength of an edit at each token, by what a probe sees there, and by nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from edits import HEADS, close, logits
from layer_edits import inputs, logits_of
from peft import PeftModel
from tiny_models import LANGUAGE_MODELS
from torch import Tensor, nn

from lightning_peft.editing import head_offsets_config, head_sites, layer_offsets_config, layer_sites
from lightning_peft.positions import answering
from lightning_peft.stack.adapter_files.saving import load_adapter, save_adapter
from lightning_peft.stack.gates import GATES, gated, truth_gate
from lightning_peft.stack.stack import AdapterStack, stack_of
from lightning_peft.testing.models import rough

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Unsupported layer type")
EDITS = ("heads", "block", "mlp", "ablation")
START = torch.tensor([2, 4, 6])


def make_config(model: nn.Module, edit: str, **options: Any) -> Any:
    options = {"alpha": 2.0, "positions": "all"} | options
    if edit == "heads":
        return head_offsets_config(head_sites(model), HEADS, **options)
    operation = "ablate" if edit == "ablation" else "add"
    return layer_offsets_config(layer_sites(model, "mlp" if edit == "mlp" else "block"), operation=operation, **options)


def edited(kind: str, edit: str, bias: float | None = None, **options: Any) -> tuple[Any, AdapterStack]:
    """A model with a random edit and random probes; `bias` makes the probes see nothing else than that score."""
    model = rough(kind)
    stack = stack_of(model)
    part = stack.add(make_config(model, edit, **options), "edit", computed=True)
    generators = {kind: torch.Generator().manual_seed(3) for kind in (False, True)}  # vectors are as without a gate
    for key, tensor in stack.tensors(part).items():
        probe = key.endswith("_probe")
        tensor.copy_(torch.randn(tensor.shape, generator=generators[probe]))
        if probe and bias is not None:
            tensor.zero_()
            tensor[..., -1] = bias
    return model, stack


# -- the strength ---------------------------------------------------------------------------------------------------


def test_adaptive_strength_is_one_minus_p_plus_beta() -> None:
    """p is the truth probe's probability, here by its own formula."""
    generator = torch.Generator().manual_seed(0)
    x, coef, intercept = (torch.randn(size, generator=generator) for size in ((5, 2, 3), (2, 3), (2,)))
    p = 1 / (1 + torch.exp(-((x * coef).sum(-1) + intercept)))
    found = gated(x, truth_gate(coef, intercept), "adaptive", beta=0.25)
    torch.testing.assert_close(found, 1 - p + 0.25)
    conditional = gated(x, truth_gate(coef, intercept), "conditional", threshold=0.3)
    assert torch.equal(conditional, (1 - p > 0.3).float()) and 0 < conditional.mean() < 1


@pytest.mark.parametrize("edit", EDITS)
def test_where_the_probe_is_sure_of_truth_only_beta_is_left(edit: str, tokens: Tensor) -> None:
    model, _ = edited("llama", edit, bias=-1e4, gate="adaptive", beta=0.5)  # p = 1
    half, _ = edited("llama", edit, alpha=1.0)
    assert close(logits(model, tokens), logits(half, tokens), 1e-6)
    nothing, _ = edited("llama", edit, bias=-1e4, gate="adaptive")
    assert torch.equal(logits(nothing, tokens), logits(rough("llama"), tokens))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("edit", EDITS)
def test_where_the_probe_is_sure_of_untruth_the_edit_is_whole(edit: str, gate: str, tokens: Tensor) -> None:
    model, _ = edited("llama", edit, bias=1e4, gate=gate)
    assert torch.equal(logits(model, tokens), logits(edited("llama", edit)[0], tokens))


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_conditional_edit_moves_the_tokens_where_its_probe_fires_and_no_others(
    kind: str, edit: str, tokens: Tensor
) -> None:
    """In the first edited module, before anything else has moved."""
    model, stack = edited(kind, edit, gate="conditional", threshold=0.5)
    key = next(key for key in stack.tensors(stack["edit"]) if key.endswith("_probe"))
    probe, site = stack.tensors(stack["edit"])[key], key.removeprefix("base_model.model.").split(".head_off")[0]
    site = site.split(".layer_edits")[0]
    module = model.get_submodule(site)
    seen: list[Tensor] = []
    if edit == "heads":
        hook = module.base_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    else:
        hook = module.register_forward_hook(
            lambda _, __, out: seen.append((out if isinstance(out, Tensor) else out[0]).clone())
        )
    with stack.disabled():
        logits(model, tokens)

    def part(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 8))[:, :, 1] if edit == "heads" else x

    probe = probe.reshape(-1)
    score = part(seen[0]) @ probe[:-1]
    probe[-1] = -score.median() - 1e-3
    logits(model, tokens)
    hook.remove()
    moved = (part(seen[1]) != part(seen[0])).any(-1)
    assert torch.equal(moved, score + probe[-1] > 0) and 0.4 < moved.float().mean() < 0.6


# -- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_a_row_does_not_change_with_its_batch(kind: str, edit: str, gate: str, tokens: Tensor) -> None:
    """Alone, or padded on either side beside other rows."""
    model, _ = edited(kind, edit, gate=gate, positions="answer", beta=0.1)
    neighbours = tokens[[1, 2, 2, 0]].roll(1, 0)
    alone, start = tokens[:1, :6], torch.tensor([2])
    with answering(model, start=start):
        expected = logits(model, alone, position_ids=torch.arange(6)[None])
    for left in (True, False):
        batch = torch.cat([neighbours, torch.zeros(1, 9, dtype=torch.long)])
        mask = torch.ones_like(batch)
        batch[-1, 3:] = batch[-1, 3:] * 0
        where = slice(3, 9) if left else slice(0, 6)
        mask[-1], batch[-1, where] = 0, alone[0]
        mask[-1, where] = 1
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        with answering(model, start=torch.tensor([1, 5, 3, 2, 2])):
            found = logits(model, batch, attention_mask=mask, position_ids=places)
        assert close(found[-1, where], expected[0], 2e-5)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_a_call_that_continues_a_cached_past_is_one_call(kind: str, edit: str, gate: str, tokens: Tensor) -> None:
    model, _ = edited(kind, edit, gate=gate, positions="answer", beta=0.1)
    with torch.no_grad(), answering(model, start=START):
        whole = model(input_ids=tokens).logits
        past = model(input_ids=tokens[:, :5], use_cache=True)
        rest = model(input_ids=tokens[:, 5:], past_key_values=past.past_key_values)
    assert close(torch.cat([past.logits, rest.logits], 1), whole)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("edit", EDITS)
def test_generation_with_a_cache_is_generation_without(edit: str, gate: str, tokens: Tensor) -> None:
    model, _ = edited("llama", edit, gate=gate, positions="answer", alpha=4.0)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    given = {"input_ids": tokens * mask, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**given, use_cache=True), model.generate(**given, use_cache=False))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("edit", EDITS)
def test_the_dial_turns_a_gated_edit(edit: str, gate: str, tokens: Tensor) -> None:
    model, stack = edited("llama", edit, gate=gate)
    base, moved = logits(rough("llama"), tokens), logits(model, tokens)
    assert not close(moved, base, 1e-3)
    stack.scale(0.0)
    assert torch.equal(logits(model, tokens), base)
    stack.scale(-1.0)
    assert torch.equal(logits(model, tokens), logits(edited("llama", edit, gate=gate, alpha=-2.0)[0], tokens))
    stack.scale(1.0)
    assert torch.equal(logits(model, tokens), moved)
    with stack.disabled():
        assert torch.equal(logits(model, tokens), base)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("edit", EDITS)
def test_the_probes_are_saved_with_the_adapter(edit: str, gate: str, tokens: Tensor, tmp_path: Path) -> None:
    model, stack = edited("llama", edit, gate=gate, beta=0.3, threshold=0.4)
    assert any(key.endswith("_probe") for key in stack.tensors(stack["edit"]))
    assert not any(
        tensor.requires_grad for name, tensor in model.state_dict(keep_vars=True).items() if "_probe" in name
    )
    save_adapter(model, tmp_path)
    again = rough("llama")
    load_adapter(again, tmp_path)
    loaded = PeftModel.from_pretrained(rough("llama"), tmp_path)
    for copy in (again, loaded):
        assert torch.equal(logits(copy, tokens), logits(model, tokens))


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", ["bert", "t5", "vit"])
def test_other_architectures_are_gated_row_by_row_too(kind: str, edit: str, tmp_path: Path) -> None:
    model, stack = edited(kind, edit, gate="adaptive", beta=0.1)
    moved = logits_of(model, kind)
    with torch.no_grad():
        rows = [model(**{name: value[[row]] for name, value in inputs(kind).items()}).logits for row in range(3)]
    assert close(torch.cat(rows), moved)
    save_adapter(model, tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(rough(kind), tmp_path), kind), moved)
    stack.scale(0.0)
    assert torch.equal(logits_of(model, kind), logits_of(rough(kind), kind)) and not close(
        moved, logits_of(model, kind), 1e-3
    )


@pytest.mark.parametrize("edit", EDITS)
def test_a_gated_edit_cannot_be_merged(edit: str, tokens: Tensor) -> None:
    model, stack = edited("llama", edit, gate="adaptive")
    before = logits(model, tokens)
    with pytest.raises(ValueError, match=r"^Adapter 'edit' is gated: its strength is found anew at each token, "):
        stack.merge()
    assert torch.equal(logits(model, tokens), before)


@pytest.mark.parametrize("edit", EDITS)
def test_without_a_gate_there_is_no_probe(edit: str) -> None:
    _, stack = edited("llama", edit)
    assert not any("probe" in key for key in stack.tensors(stack["edit"]))


@pytest.mark.parametrize("edit", EDITS)
def test_a_bfloat16_model_is_gated_in_bfloat16(edit: str, tokens: Tensor) -> None:
    model, _ = edited("llama", edit, gate="adaptive")
    assert logits(model.bfloat16(), tokens).dtype == torch.bfloat16
