"""Intervals cover what they should, though examples depend on one another."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binomtest

from lightning_peft.editing.intervals import clustered_wilson, wilson


@pytest.mark.parametrize("right", [0, 1, 9, 10])
def test_wilsons_interval_is_scipys(right: int) -> None:
    expected = binomtest(right, 10).proportion_ci(method="wilson")
    assert wilson(right / 10, 10) == pytest.approx(tuple(expected), abs=1e-12)


def test_clusters_of_one_are_examples_but_for_the_sample_variance() -> None:
    right = (torch.arange(40) < 30).long()
    assert clustered_wilson(right, torch.arange(40)) == pytest.approx(wilson(0.75, 39), abs=1e-12)
    with_copies = right.repeat_interleave(3), torch.arange(40).repeat_interleave(3)
    assert clustered_wilson(*with_copies) == pytest.approx(wilson(0.75, 39), abs=1e-12)


def test_intervals_cover_the_truth_as_often_as_they_say_though_statements_depend_on_one_another() -> None:
    """Drawn 400 times: 50 questions of 6 statements that are mostly right or wrong together."""
    generator = torch.Generator().manual_seed(3)
    draws, share = 400, 0.7
    right = (torch.rand(50, draws, generator=generator) < share).repeat_interleave(6, 0)
    right = torch.where(torch.rand(300, draws, generator=generator) < 0.2, ~right, right)
    truth = share * 0.8 + (1 - share) * 0.2
    question, estimate = torch.arange(300) // 6, right.double().mean(0)
    intervals = [clustered_wilson(right[:, draw], question) for draw in range(draws)]
    naive = (truth * (1 - truth) / 300) ** 0.5
    assert 0.92 <= sum(low <= truth <= high for low, high in intervals) / draws <= 0.98
    assert float(((estimate - truth).abs() <= 1.96 * naive).double().mean()) < 0.8  # as if all were independent


@pytest.mark.parametrize("right", [0, 1])
def test_all_right_and_all_wrong_have_intervals_too(right: int) -> None:
    low, high = clustered_wilson(torch.full((60,), right), torch.arange(60) // 2)
    assert (low, high) == wilson(right, 30) and 0 <= low < high <= 1 and high - low > 0.1
