"""What a model is asked for inside holds what adapters change, whoever came first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn

from lightning_peft import callbacks as c
from lightning_peft.fitting.adapter_callback import AdapterCallback
from lightning_peft.stack.stack import stack_of

MAKE: dict[str, Callable[[], AdapterCallback]] = {
    "Pfeiffer": lambda: c.Pfeiffer(size=4),
    "AdapterPlus": lambda: c.AdapterPlus(size=4),
    "ParallelAdapter": lambda: c.ParallelAdapter(size=4),
    "LayerOffsets": lambda: c.LayerOffsets(positions="all"),
    "HeadOffsets": lambda: c.HeadOffsets(positions="all"),
}


def adapted(model: nn.Module, method: str) -> nn.Module:
    """Put the method's adapter on, with weights that move every layer."""
    before = set(model.parameters())
    MAKE[method]().apply(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter not in before:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def hidden_states(model: Any) -> tuple[Tensor, ...]:
    ids = torch.arange(3, 17).reshape(2, 7)
    return tuple(model(input_ids=ids, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("method", MAKE)
def test_hidden_states_are_the_adapted_ones_also_where_they_were_asked_for_before(kind: str, method: str) -> None:
    model = tiny(kind)
    before = hidden_states(model)
    again, expected = hidden_states(adapted(model, method)), hidden_states(adapted(tiny(kind), method))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert not torch.equal(expected[1], before[1])


def test_a_hook_of_somebody_else_sees_what_the_next_block_is_given() -> None:
    model: Any = tiny("llama")
    seen: dict[str, Tensor] = {}
    block, following = model.model.layers[0], model.model.layers[1]
    block.register_forward_hook(lambda _, __, output: seen.update(gave=output))
    following.register_forward_pre_hook(lambda _, args: seen.update(given=args[0]))
    for method in ("LayerOffsets", "Pfeiffer"):
        adapted(model, method)
        hidden_states(model)
        assert torch.equal(seen["gave"], seen["given"])
    for part in list(stack_of(model).parts):
        stack_of(model).remove(part.name)
    assert len(block._forward_hooks) == 2  # this test's own, and transformers'


def test_adapters_act_in_the_order_in_which_they_came() -> None:
    orders = (("LayerOffsets", "Pfeiffer"), ("Pfeiffer", "LayerOffsets"))
    plain, asked = [], []
    for methods in orders:
        for results, first in ((plain, False), (asked, True)):
            model = tiny("llama")
            if first:
                hidden_states(model)
            for method in methods:
                adapted(model, method)
            results.append(hidden_states(model)[-1])
    assert all(torch.equal(a, b) for a, b in zip(plain, asked, strict=True))
    assert not torch.equal(*plain)
