"""A computed adapter is put on a backbone by its keys, whatever wraps the modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from tiny_models import tiny
from torch import Tensor, nn

from lightning_peft import ComputedAdapter
from lightning_peft.backbone.layers import layer_sites
from lightning_peft.editing import HeadEdit, head_sites, layer_offsets_config
from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.computed import saved_key
from lightning_peft.stack.stack import adapters, stack_of

pytestmark = pytest.mark.filterwarnings("ignore")
HEADS = [(1, 2), (0, 1), (1, 0)]


def heads(model: nn.Module, scale: float = 1.0, positions: str = "all") -> ComputedAdapter:
    sites = head_sites(model)
    directions = torch.randn(3, sites[0].head_dim, generator=torch.Generator().manual_seed(1))
    edit = HeadEdit(HEADS, scale * directions, torch.ones(3), torch.ones(3, 4), {"made": "here"})
    return edit.adapter(sites, 2.0, positions)


def blocks(model: nn.Module) -> ComputedAdapter:
    sites = layer_sites(model, "block")
    vectors = torch.randn(len(sites), 1, sites[0].width, generator=torch.Generator().manual_seed(2))
    keys = [saved_key(site.name, "layer_edits.layer_offsets") for site in sites]
    config = layer_offsets_config(sites, positions="all")
    return ComputedAdapter(config, dict(zip(keys, vectors, strict=True)))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 12)[None]).logits


def with_compiled_blocks() -> nn.Module:
    model = tiny("llama")
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    return model


def with_blocks_compiled_in_place() -> nn.Module:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def with_lora() -> nn.Module:
    model = tiny("llama")
    stack_of(model).add(LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"]), "lora")
    return model


@pytest.mark.parametrize(
    ("wrapped", "made"),
    [
        (with_compiled_blocks, heads),
        (with_blocks_compiled_in_place, heads),
        (with_blocks_compiled_in_place, blocks),
        (with_lora, heads),
        (with_lora, blocks),
    ],
)
def test_wrapped_modules_take_what_plain_ones_take(
    wrapped: Callable[[], nn.Module], made: Callable[[nn.Module], ComputedAdapter]
) -> None:
    plain, model = tiny("llama"), wrapped()
    base = logits(plain)
    stack_of(plain).put("edit", made(plain))
    stack_of(model).put("edit", made(model))
    expected = logits(plain)
    assert not torch.allclose(expected, base) and torch.allclose(logits(model), expected, atol=1e-5)


def test_it_is_recorded_computed_and_takes_the_place_of_what_had_its_name() -> None:
    model = tiny("llama")
    stack = stack_of(model)
    first = stack.put("edit", heads(model))
    other = stack.put("other", blocks(model))
    again = stack.put("edit", heads(model, scale=-1.0))
    assert stack.parts == [other, again] and again is not first
    assert again.computed and again.record == {"made": "here"}
    made = heads(model, scale=-1.0)
    tensors = stack.tensors(again)
    assert tensors.keys() == made.tensors.keys() and all(torch.equal(tensors[k], made.tensors[k]) for k in tensors)


@pytest.mark.parametrize("wrong", ["missing", "shape", "nan"])
def test_tensors_that_do_not_fit_leave_the_backbone_as_it_was(wrong: str) -> None:
    model = tiny("llama")
    base, made = logits(model), heads(model)
    tensors = dict(made.tensors)
    key = next(iter(tensors))
    if wrong == "missing":
        del tensors[key]
    else:
        tensors[key] = tensors[key][:, :3] if wrong == "shape" else tensors[key] * float("nan")
    with pytest.raises(AdapterError, match="the computed edit"):
        stack_of(model).put("edit", ComputedAdapter(made.config, tensors))
    assert "edit" not in stack_of(model) and torch.equal(logits(model), base)


def test_the_function_of_the_first_release_puts_the_same() -> None:
    from lightning_peft.callbacks.edits.iti import install

    model, other = tiny("llama"), tiny("llama")
    sites = head_sites(model)
    edit = HeadEdit(HEADS, torch.ones(3, sites[0].head_dim), torch.ones(3), torch.ones(3, 4), {})
    install(stack_of(model), "iti", edit, sites, 2.0, "all")
    stack_of(other).put("iti", edit.adapter(sites, 2.0, "all"))
    assert torch.equal(logits(model), logits(other)) and adapters(model)["iti"].config.alpha == 2.0
