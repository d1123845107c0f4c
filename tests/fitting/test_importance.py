"""The scores of blocks are the authors' numbers; draws are distinct, and follow what they are to follow."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_peft.fitting.importance import draw_suppressed, draw_trained, updated

# `ISTCallback` of antgroup/importance-aware-sparse-tuning-IST-paper at 53ab149, run on eight layers whose loss is
# known: in each of five scorings the sets that it suppressed and the losses that it got, and its scores afterwards
SCORINGS = [
    ([[1, 2, 6, 7], [2, 4, 5, 6], [0, 3, 6, 7]], [1.9, 1.91, 1.27]),
    ([[1, 2, 3, 5], [1, 2, 5, 6], [0, 3, 4, 7]], [0.48, 1.88, 0.51]),
    ([[0, 2, 3, 5], [0, 1, 3, 7], [3, 5, 6, 7]], [0.47, 0.48, 1.32]),
    ([[0, 3, 5, 7], [0, 1, 3, 5], [0, 2, 6, 7]], [0.52, 0.46, 1.89]),
    ([[0, 3, 4, 7], [0, 1, 2, 5], [3, 4, 6, 7]], [0.51, 1.08, 1.31]),
]
FIRST = [0.2200118601, -0.1081456393, -0.2200118601, 0.2200118601, -0.1118662208, -0.1118662208, 0.0, 0.1118662208]
LAST = [
    1.3666242361,
    0.0774737298,
    -1.1698019505,
    1.6754722595,
    0.4019343555,
    -0.2275160104,
    -1.9629323483,
    -0.0889647901,
]


def zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_scores_are_those_of_the_authors_code() -> None:
    scores = zeros(8)
    for number, (sets, losses) in enumerate(SCORINGS):
        scores = updated(scores, sets, losses, rate=10.0)
        if number == 0:
            torch.testing.assert_close(scores, torch.tensor(FIRST, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores, torch.tensor(LAST, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_blocks_that_were_not_suppressed_and_equal_losses_leave_scores_as_they_are() -> None:
    before = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert torch.equal(updated(before, [[0], [1], [0]], [0.7, 0.7, 0.7], 10.0), before)
    assert updated(before, [[0], [1]], [0.1, 0.9], 10.0)[2] == 0.5
    assert torch.equal(updated(before, [[0], [1]], [math.nan, 0.9], 10.0), before)
    assert torch.equal(updated(before, [[0], [1]], [-1e4, 0.9], 10.0), before)  # its reward is beyond any number


@pytest.mark.parametrize(("count", "sets", "expected"), [(4, 3, 3), (1, 3, 3), (2, 70, 28)])
def test_sets_to_suppress_are_distinct_as_far_as_there_are_any(count: int, sets: int, expected: int) -> None:
    drawn = draw_suppressed(zeros(8), count, sets, generator())
    assert len({tuple(blocks) for blocks in drawn}) == len(drawn) == expected
    assert all(blocks == sorted(set(blocks)) and len(blocks) == count for blocks in drawn)


def test_what_is_unimportant_is_trained_less_often_and_suppressed_more_often() -> None:
    scores, drawing = torch.tensor([3.0, 0.0, 0.0, 0.0, -3.0], dtype=torch.float64), generator()
    trained = torch.tensor([draw_trained(scores, 1, drawing)[0] for _ in range(4000)]).bincount(minlength=5) / 4000
    expected = torch.sigmoid(-scores) / torch.sigmoid(-scores).sum()
    assert torch.allclose(trained.double(), expected, atol=0.03)
    turned = torch.tensor([draw_suppressed(scores, 1, 1, drawing)[0][0] for _ in range(4000)]).bincount(minlength=5)
    assert torch.allclose(turned.double() / 4000, expected.flip(0), atol=0.03)
