"""Many interventions measured together give what each gives alone, as an adapter."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from tiny_models import VOCABULARY, tiny
from torch import Tensor, nn
from windowed_models import PACKED

from lightning_peft.editing import HeadEdit, head_sites
from lightning_peft.editing.directions import random_directions
from lightning_peft.effects import batch_effects
from lightning_peft.packing import logprobs
from lightning_peft.packing.choices import ChoiceScorer
from lightning_peft.stack.stack import adapters, stack_of
from lightning_peft.sweep.fit import best_heads
from lightning_peft.sweep.grid import Grid

KINDS = ("llama", "gpt2", "gpt_neox")
PROMPT = [5, 9, 11, 3, 7, 8, 12, 30, 31]


def points(model: nn.Module) -> list[tuple[HeadEdit, float]]:
    """Numbers of heads by strengths, then random directions, other heads, and strength 0."""
    heads = [(2, 3), (1, 0), (1, 3), (0, 1)]
    width = head_sites(model)[0].head_dim
    record = {"heads": [list(pair) for pair in heads], "sigma": [1.0, 0.5, 2.0, 1.5]}
    edit = HeadEdit(heads, random_directions(4, width, 0), torch.tensor(record["sigma"]), torch.ones(3, 4), record)
    grid = [(best_heads(edit, k), alpha) for k in (1, 2, 4) for alpha in (-1.0, 2.0, 5.0)]
    random = replace(edit, directions=random_directions(4, width, 9))
    elsewhere = replace(edit, heads=[(1, 1), (2, 0), (0, 0), (0, 2)])
    return [*grid, (random, 2.0), (elsewhere, 2.0), (edit, 0.0)]


def batch(seed: int) -> dict[str, Tensor]:
    """A question: rows that share a prompt, with random answers."""
    generator = torch.Generator().manual_seed(seed)
    question = PROMPT + torch.randint(3, VOCABULARY, (5,), generator=generator).tolist()
    rows = [question + torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (3, 1, 5, 2)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : len(question)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def alone(model: nn.Module, edit: HeadEdit, alpha: float, seeds: range, positions: str) -> Tensor:
    """The scores of an adapter, with a scorer of its own."""
    stack_of(model).put("iti", edit.adapter(head_sites(model), alpha, positions))
    scorer = ChoiceScorer(model)
    found = torch.stack([scorer.score(*batch(seed).values()) for seed in seeds])
    stack_of(model).remove("iti")
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["answer", "generated[1:]"])
def test_scores_are_those_of_each_point_alone(kind: str, positions: str) -> None:
    model, seeds = tiny(kind), range(3)
    chosen = points(model)
    grid = Grid(model, head_sites(model), chosen, positions, rows=4)
    assert max(map(len, grid._together)) > 1
    together = torch.stack(list(grid.scores(map(batch, seeds))), dim=1)
    scorer = ChoiceScorer(model)
    base = torch.stack([scorer.score(*batch(seed).values()) for seed in seeds])
    expected = torch.stack([base, *(alone(model, *point, seeds, positions) for point in chosen)])
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=0)
    assert torch.equal(together[0], base), "the base is scored as ever"
    assert float((expected[1:-1] - base).abs().amax((1, 2)).min()) > 0.01, "every edit shows"


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_are_those_of_each_point_alone(kind: str, tokens: Tensor) -> None:
    model = tiny(kind)
    chosen = points(model)
    found = Grid(model, head_sites(model), chosen, rows=4).divergence(tokens[0])
    text = {"input_ids": tokens[:1], "attention_mask": torch.ones_like(tokens[:1])}
    for point, (edit, alpha) in enumerate(chosen):
        stack_of(model).put("iti", edit.adapter(head_sites(model), alpha, "answer"))
        expected = batch_effects(model, text, adapters(model).disabled)[0, 3]
        stack_of(model).remove("iti")
        assert float(found[point]) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
    assert float(found[-1]) == 0.0, "strength 0 is the base"


def test_divergences_of_a_few_points_at_a_time_are_the_same(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    grid = Grid(model, head_sites(model), points(model), rows=4)
    together, rows = grid.divergence(tokens[0]), []
    model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    monkeypatch.setattr(logprobs, "LOGITS", 2 * (len(tokens[0]) - 1) * VOCABULARY)
    torch.testing.assert_close(grid.divergence(tokens[0]), together, rtol=1e-5, atol=1e-7)
    assert max(rows) == 2


@pytest.mark.parametrize("kind", PACKED)
def test_a_model_with_windows_is_measured_as_each_point_alone(kind: str) -> None:
    model = PACKED[kind]()
    chosen = points(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # falling back would warn
        together = torch.stack(list(Grid(model, head_sites(model), chosen, rows=4).scores(map(batch, range(2)))), dim=1)
    expected = torch.stack([alone(model, *point, range(2), "answer") for point in chosen])
    torch.testing.assert_close(together[1:], expected, atol=1e-4, rtol=0)


def test_points_of_one_first_layer_share_a_call_and_no_other_does() -> None:
    model = tiny("llama")
    chosen = points(model)
    grid = Grid(model, head_sites(model), chosen, rows=3)
    assert sorted(i for call in grid._together for i in call) == list(range(len(chosen)))
    for call in grid._together:
        assert len(call) <= 3
        assert len({min(layer for layer, _ in chosen[i][0].heads) for i in call}) == 1


def test_a_model_that_cannot_make_rows_is_measured_point_by_point_with_a_warning() -> None:
    model = tiny("llama")
    chosen = points(model)
    (expected,) = Grid(model, head_sites(model), chosen, rows=1).scores([batch(0)])

    def one_row_only(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) > 1:
            raise ValueError("more rows than were given")

    model.model.layers[2].mlp.register_forward_pre_hook(one_row_only)
    with pytest.warns(UserWarning, match="as rows of one call, it raises ValueError"):
        grid = Grid(model, head_sites(model), chosen, rows=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*scored row by row")  # which needs rows too
        (found,) = grid.scores([{name: values[:1] for name, values in batch(0).items()}])
    torch.testing.assert_close(found[:, 0], expected[:, 0], atol=1e-4, rtol=0)


def test_a_model_whose_answers_cannot_be_packed_is_measured_point_by_point(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")
    grid = Grid(model, head_sites(model), points(model), rows=4)
    (expected,) = grid.scores([batch(1)])
    monkeypatch.setattr(ChoiceScorer, "_try_packing", lambda *_: False)
    grid = Grid(model, head_sites(model), points(model), rows=4)
    (found,) = grid.scores([batch(1)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_question_whose_answers_begin_at_different_tokens_is_measured_point_by_point() -> None:
    model = tiny("llama")
    chosen = points(model)
    usual, odd = batch(0), batch(1)
    odd["labels"][1, len(PROMPT) + 4] = odd["input_ids"][1, len(PROMPT) + 4]  # this answer begins a token earlier
    together = list(Grid(model, head_sites(model), chosen, rows=4).scores([usual, odd]))
    alone = list(Grid(model, head_sites(model), chosen, rows=1).scores([usual, odd]))
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
