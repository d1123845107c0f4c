"""Folds part whole questions, evenly, by category, and the same way for the same seed."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_peft.truthfulqa import Question, load_questions
from lightning_peft.truthfulqa.folds import assign_folds, inner_split


def questions(categories: Sequence[str]) -> list[Question]:
    """One question for each category given, with a text of its own."""
    return [Question(i, f"Question {i}?", category, (), "", (), ()) for i, category in enumerate(categories)]


def spread(members: Sequence[Question], folds: Sequence[int], num_folds: int) -> int:
    """The largest difference, over categories, between the folds' shares of a category."""
    counts = Counter((q.category, fold) for q, fold in zip(members, folds, strict=True))
    return max(
        max(counts[category, f] for f in range(num_folds)) - min(counts[category, f] for f in range(num_folds))
        for category in {q.category for q in members}
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcdefg"), min_size=5, max_size=60), st.integers(2, 5), st.integers(0, 99))
def test_folds_and_their_categories_are_as_even_as_can_be(categories: list[str], num_folds: int, seed: int) -> None:
    members = questions(categories)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also where a category has fewer questions than there are folds
        folds = assign_folds(members, num_folds, seed)
    sizes = [folds.count(fold) for fold in range(num_folds)]
    assert max(sizes) - min(sizes) <= 1
    assert spread(members, folds, num_folds) <= 1


def test_the_order_of_the_questions_does_not_change_a_question_s_fold() -> None:
    members = questions("aabbbccccd")
    fold_of = dict(zip((q.id for q in members), assign_folds(members, 2, seed=5), strict=True))
    turned = members[::-1]
    assert [fold_of[q.id] for q in turned] == assign_folds(turned, 2, seed=5)


def test_the_same_question_in_other_spaces_and_case_stays_in_its_fold() -> None:
    members = questions("aaaabbbb")
    again = [Question(100 + q.id, f"  {q.text.upper()} ".replace(" ", "  "), "z", (), "", (), ()) for q in members]
    for seed in range(8):
        folds = assign_folds([*members, *again], 2, seed)
        assert folds[: len(members)] == folds[len(members) :]


def test_seeds_draw_different_folds() -> None:
    members = questions("abcd" * 8)
    assert len({tuple(assign_folds(members, 2, seed)) for seed in range(10)}) > 5


@pytest.mark.parametrize("num_folds", [0, 1, 5])
def test_an_impossible_number_of_folds_is_one_sentence(num_folds: int) -> None:
    with pytest.raises(ValueError, match=rf"from 2 to the number of questions \(4\), got {num_folds}"):
        assign_folds(questions("abcd"), num_folds)


@pytest.mark.parametrize("val_fraction", [0.1, 0.2, 0.25, 0.5])
def test_the_inner_split_holds_out_its_share_and_keeps_the_order(val_fraction: float) -> None:
    members = questions("abcde" * 20)
    train, val = inner_split(members, val_fraction, seed=2)
    assert sorted([*train, *val], key=lambda q: q.id) == members
    assert len(val) == pytest.approx(val_fraction * len(members), abs=1)
    for part in (train, val):
        assert [q.id for q in part] == sorted(q.id for q in part)
    assert (train, val) == inner_split(members, val_fraction, seed=2) != inner_split(members, val_fraction, seed=3)


def test_the_inner_split_keeps_copies_of_a_question_together() -> None:
    members = questions("ab" * 10)
    again = [Question(100 + q.id, q.text.lower(), q.category, (), "", (), ()) for q in members]
    train, val = inner_split([*members, *again], 0.2)
    assert {q.text.casefold() for q in train}.isdisjoint(q.text.casefold() for q in val)


@pytest.mark.parametrize("val_fraction", [0.0, -0.1, 0.6, 1.0])
def test_an_impossible_share_is_one_sentence(val_fraction: float) -> None:
    with pytest.raises(ValueError, match=r"val_fraction must be above 0 and at most 0\.5"):
        inner_split(questions("ab" * 10), val_fraction)


def test_too_few_questions_for_the_share_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"val_fraction 0\.2 needs at least 5 training questions, got 2"):
        inner_split(questions("ab"), 0.2)


@pytest.mark.data
@pytest.mark.parametrize("num_folds", [2, 5])
def test_on_truthfulqa(truthfulqa_data: Path, num_folds: int) -> None:
    members = load_questions(truthfulqa_data / "v0")
    folds = assign_folds(members, num_folds)
    sizes = [folds.count(fold) for fold in range(num_folds)]
    assert max(sizes) - min(sizes) <= 1 and spread(members, folds, num_folds) <= 1
