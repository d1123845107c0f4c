"""Which questions are trained on and which are tested: grouped by question, stratified by category, seeded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from lightning_peft.truthfulqa.questions import Question


def assign_folds(questions: Sequence[Question], num_folds: int = 2, seed: int = 0) -> list[int]:
    """The fold in which each question is tested.

    Questions with the same text share a fold, and each category is spread over the folds.

    Args:
        questions: the whole set.
        num_folds: at least 2.
        seed: of the shuffle.
    """
    if not 2 <= num_folds <= len(questions):
        raise ValueError(f"num_folds must be from 2 to the number of questions ({len(questions)}), got {num_folds}.")
    categories = [question.category for question in questions]
    groups = [" ".join(question.text.split()).casefold() for question in questions]
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    folds = np.empty(len(questions), dtype=int)
    with warnings.catch_warnings():
        # a category with fewer questions than folds cannot be in each of them, which is nobody's mistake
        warnings.filterwarnings("ignore", message="The least populated class")
        for fold, (_, test) in enumerate(splitter.split(np.zeros(len(questions)), categories, groups)):
            folds[test] = fold
    return [int(fold) for fold in folds]


def inner_split(
    questions: Sequence[Question], val_fraction: float = 0.2, seed: int = 0
) -> tuple[list[Question], list[Question]]:
    """Split training questions into those to learn from and those to choose hyperparameters on."""
    if not 0.0 < val_fraction <= 0.5:
        raise ValueError(f"val_fraction must be above 0 and at most 0.5, got {val_fraction}.")
    # one fold of round(1 / fraction) is the validation part, so that it is stratified and grouped as the folds are
    folds = assign_folds(questions, max(2, round(1 / val_fraction)), seed + 1)
    train = [question for question, fold in zip(questions, folds, strict=True) if fold != 0]
    val = [question for question, fold in zip(questions, folds, strict=True) if fold == 0]
    return train, val
