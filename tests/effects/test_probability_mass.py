"""Probability mass is the log of the choices' summed probability, and shows what a share among choices cannot."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_peft.effects import choice_mass


def test_it_is_the_sum_by_hand_in_the_order_of_the_questions_numbers() -> None:
    question = torch.tensor([9, 4, 9, 4, 4])
    base = torch.tensor([0.5, 0.1, 0.25, 0.2, 0.3]).log()
    adapted = torch.tensor([0.4, 0.05, 0.3, 0.1, 0.15]).log()
    expected = [math.log(0.3 / 0.6), math.log(0.7 / 0.75)]
    torch.testing.assert_close(
        choice_mass(adapted, base, question), torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=1e-6
    )


def test_log_probabilities_of_long_answers_do_not_vanish() -> None:
    base = torch.tensor([-1000.0, -1001.0, -1200.0])
    assert choice_mass(base - 7.25, base, torch.zeros(3, dtype=torch.long)).tolist() == [-7.25]


def test_of_a_model_and_itself_it_is_exactly_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = -50 * torch.rand(400, generator=generator)
    question = torch.randint(0, 90, (400,), generator=generator)
    found = choice_mass(logprobs, logprobs.clone(), question)
    assert torch.equal(found, torch.zeros(len(question.unique()), dtype=torch.float64))


def share_of_right(logprobs: Tensor) -> float:
    """The probability of the first two choices over that of all four."""
    return float(logprobs.exp()[:2].sum() / logprobs.exp().sum())


def test_a_share_among_choices_rises_where_the_distribution_is_destroyed_and_the_mass_falls() -> None:
    question = torch.zeros(4, dtype=torch.long)
    base = torch.tensor([0.02, 0.03, 0.2, 0.15]).log()
    destroyed = torch.full((4,), 1e-6).log()
    assert share_of_right(destroyed) > share_of_right(base) + 0.3
    assert float(choice_mass(destroyed, base, question)) == pytest.approx(math.log(4e-6 / 0.4), abs=1e-5)


def test_impossible_choices_add_nothing_and_where_all_are_it_is_minus_infinity() -> None:
    never = -math.inf
    base = torch.tensor([-1.0, -2.0, -1.0, never])
    adapted = torch.tensor([-1.0, never, never, never])
    found = choice_mass(adapted, base, torch.tensor([0, 0, 1, 1]))
    assert found.tolist() == [pytest.approx(-1 - math.log(math.exp(-1) + math.exp(-2))), never]
    assert choice_mass(adapted, adapted, torch.tensor([0, 0, 1, 1])).isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("adapted", "sentence"),
    [
        (torch.zeros(3), r"a question for each choice, three of \[N\]; got \[3\], \[2\], \[2\]\.$"),
        (torch.tensor([-1.0, 0.3]), r"^A log-probability is at most 0, got 0\.3\.$"),
        (torch.tensor([-1.0, math.nan]), r"^A log-probability is at most 0, got nan\.$"),
    ],
)
def test_what_is_no_log_probability_is_one_sentence(adapted: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        choice_mass(adapted, torch.tensor([-1.0, -2.0]), torch.tensor([0, 0]))
