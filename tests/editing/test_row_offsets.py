"""Each row of a call is what an adapter of its own would make of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from edits import logits
from tiny_models import LANGUAGE_MODELS, tiny
from torch import Tensor, nn

from lightning_peft.editing import HeadEdit, RowOffsets, displacements, head_sites
from lightning_peft.editing.directions import random_directions
from lightning_peft.positions import answering
from lightning_peft.stack.stack import stack_of

TEXT = torch.tensor([[5, 9, 11, 3, 7, 8, 12]])


def edits(model: nn.Module) -> list[tuple[HeadEdit, float]]:
    """Several strengths, also 0 and negative, of edits of different heads: nested, apart, and in random directions."""
    width = head_sites(model)[0].head_dim
    heads = [(2, 3), (1, 0), (1, 3), (0, 1)]
    generator = torch.Generator().manual_seed(1)
    most = HeadEdit(
        heads, random_directions(4, width, 0), torch.rand(4, generator=generator) + 0.5, torch.ones(3, 4), {}
    )
    least = replace(most, heads=heads[:2], directions=most.directions[:2], sigma=most.sigma[:2])
    return [(most, 3.0), (least, 3.0), (least, -1.0), (replace(most, directions=random_directions(4, width, 9)), 2.0),
            (replace(least, heads=[(0, 0), (0, 2)]), 4.0), (most, 0.0)]  # fmt: skip


def alone(model: nn.Module, edit: HeadEdit, alpha: float, positions: str, start: Tensor) -> Tensor:
    stack = stack_of(model)
    stack.put("iti", edit.adapter(head_sites(model), alpha, positions))
    with answering(model, start=start):
        found = logits(model, TEXT)
    stack.remove("iti")
    return found


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("positions", ["answer", "generated[0:2]", "all"])
def test_each_row_equals_its_adapter_alone(kind: str, positions: str) -> None:
    model, start = tiny(kind), torch.tensor([3])
    points = edits(model)
    rows = RowOffsets(model, displacements(head_sites(model), points), positions)
    with answering(model, start=start), rows:
        together = logits(model, TEXT)
    expected = torch.cat([alone(model, edit, alpha, positions, start) for edit, alpha in points])
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)
    assert float((expected[0] - expected[-1]).abs().max()) > 0.1, "the edits show"


def test_layers_below_the_first_edit_are_computed_for_one_row() -> None:
    model, seen = tiny("llama"), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    edit, _ = edits(model)[1]  # of layers 1 and 2
    with RowOffsets(model, displacements(head_sites(model), [(edit, 1.0), (edit, 2.0)])):
        logits(model, TEXT)
    assert seen == [1, 2, 2]


def test_afterwards_the_model_is_as_before() -> None:
    model = tiny("gpt2")
    before = logits(model, TEXT)
    with RowOffsets(model, displacements(head_sites(model), edits(model))):
        assert len(logits(model, TEXT)) == 6
    assert torch.equal(logits(model, TEXT), before)


def test_displacements_of_different_numbers_of_rows_are_refused() -> None:
    model = tiny("llama")
    names = [site.name for site in head_sites(model)]
    with pytest.raises(ValueError, match="same number of rows"):
        RowOffsets(model, {names[0]: torch.zeros(2, 32), names[1]: torch.zeros(3, 32)})


def test_several_rows_of_a_call_of_several_are_refused() -> None:
    model = tiny("llama")
    name = head_sites(model)[0].name
    with pytest.raises(ValueError, match="of a call of one row"), RowOffsets(model, {name: torch.ones(2, 32)}):
        logits(model, TEXT.repeat(2, 1))
    with RowOffsets(model, {name: torch.ones(1, 32)}):
        assert len(logits(model, TEXT.repeat(2, 1))) == 2, "one displacement serves any call"
