"""After its last adapter a model is as before: attributes, methods, hooks and outputs."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import peft
import pytest
import torch
from edits import fill
from layer_edits import KINDS, add_layer_offsets, logits_of
from tiny_models import tiny

from lightning_peft.editing import head_offsets_config, head_sites
from lightning_peft.stack.stack import find_stacks, stack_of
from lightning_peft.testing.models import rough
from lightning_peft.testing.traces import first_difference, traces


def add_head_offsets(model: Any, positions: str = "all") -> None:
    stack_of(model).add(head_offsets_config(head_sites(model), None, 2.0, positions), "heads", computed=True)
    fill(stack_of(model), "heads")


EDITS = {
    "head offsets": add_head_offsets,
    "head offsets of answers": lambda model: add_head_offsets(model, "answer"),
    "layer offsets": add_layer_offsets,
    "layer offsets of feed-forward parts": lambda model: add_layer_offsets(model, "mlp"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_leaves_nothing_behind(edit: str, kind: str) -> None:
    model: Any = rough(kind)
    before, expected = traces(model), logits_of(model, kind)
    EDITS[edit](model)
    for part in list(stack_of(model).parts):
        stack_of(model).remove(part.name)
    assert first_difference(before, traces(model)) is None
    assert torch.equal(logits_of(model, kind), expected)


@pytest.mark.parametrize("order", itertools.permutations(["lora", "prompt", "heads"]))
def test_adapters_come_off_in_any_order(order: tuple[str, ...]) -> None:
    model: Any = tiny("llama")
    before, expected = traces(model), logits_of(model, "llama")
    stack = stack_of(model)
    stack.add(peft.PrefixTuningConfig(num_virtual_tokens=2), "prompt")
    stack.add(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    stack.add(head_offsets_config(head_sites(model), None, 2.0, "all"), "heads")
    for name in order:
        stack.remove(name)
    assert first_difference(before, traces(model)) is None
    assert torch.equal(logits_of(model, "llama"), expected)


def test_methods_of_the_users_own_are_called_under_a_prompt_and_stay() -> None:
    model: Any = tiny("llama")
    calls: list[str] = []
    forward = model.forward

    @functools.wraps(forward)
    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append("forward")
        return forward(*args, **kwargs)

    model.forward = own
    before = traces(model)
    stack_of(model).add(peft.PromptTuningConfig(num_virtual_tokens=2), "prompt")
    model(input_ids=torch.tensor([[3, 4, 5]]))
    assert calls == ["forward"]
    stack_of(model).remove("prompt")
    assert first_difference(before, traces(model)) is None


def test_a_stack_that_is_held_stays_the_models_own() -> None:
    model = tiny("llama")
    stack = stack_of(model)
    assert stack_of(model) is stack and "_lightning_peft_stack" not in vars(model)
    for _ in range(2):
        stack.add(peft.LoraConfig(target_modules=["q_proj"]), "lora")
        assert find_stacks(model) == {"": stack}
        twin = copy.deepcopy(model)
        assert stack_of(twin) is not stack and stack_of(twin).backbone is twin
        stack.remove("lora")
        assert find_stacks(model) == {} and stack_of(model) is stack


def test_a_failed_attempt_leaves_nothing_behind() -> None:
    model = tiny("llama")
    before = traces(model)
    with pytest.raises(ValueError, match="nowhere"):
        stack_of(model).add(peft.LoraConfig(target_modules=["nowhere"]), "lora")
    assert first_difference(before, traces(model)) is None
