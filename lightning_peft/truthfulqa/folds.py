"""The split into training and test questions: grouped by question, stratified by category, seeded."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from lightning_peft.truthfulqa.questions import Question


def assign_folds(questions: Sequence[Question], num_folds: int = 2, seed: int = 0) -> list[int]:
    """Return the fold in which each question is tested.

    Questions with the same text share a fold. The questions of each category are shuffled and dealt out in turn, one
    category after another, so that both categories and folds are as even as can be. (scikit-learn's stratified
    splitters refuse categories with fewer questions than folds, of which TruthfulQA has several.)

    Args:
        questions: the whole set.
        num_folds: at least 2.
        seed: of the shuffle.

    Example:
        >>> from lightning_peft.truthfulqa import load_questions
        >>> folds = assign_folds(load_questions("package"), num_folds=2)
        >>> abs(folds.count(0) - folds.count(1)) <= 1
        True
    """
    groups: dict[str, str] = {}
    for question in questions:
        groups.setdefault(_group(question), question.category)
    if not 2 <= num_folds <= len(groups):
        raise ValueError(f"num_folds must be from 2 to the number of questions ({len(groups)}), got {num_folds}.")
    by_category: dict[str, list[str]] = defaultdict(list)
    for group, category in groups.items():
        by_category[category].append(group)
    shuffle = random.Random(seed)
    fold_of: dict[str, int] = {}
    for category in sorted(by_category):
        members = sorted(by_category[category])
        shuffle.shuffle(members)
        for group in members:
            fold_of[group] = len(fold_of) % num_folds
    return [fold_of[_group(question)] for question in questions]


def inner_split(
    questions: Sequence[Question], val_fraction: float = 0.2, seed: int = 0
) -> tuple[list[Question], list[Question]]:
    """Split training questions into those to learn from and those to choose hyperparameters on.

    Args:
        questions: the training questions.
        val_fraction: the share held out, rounded to one part in a whole number.
        seed: of the shuffle.
    """
    if not 0.0 < val_fraction <= 0.5:
        raise ValueError(f"val_fraction must be above 0 and at most 0.5, got {val_fraction}.")
    if len({_group(question) for question in questions}) < round(1 / val_fraction):
        raise ValueError(
            f"val_fraction {val_fraction} needs at least {round(1 / val_fraction)} training questions, "
            f"got {len(questions)}: take more questions or a larger val_fraction."
        )
    # one of round(1 / fraction) folds, so that the held-out part is stratified and grouped as the folds are
    folds = assign_folds(questions, round(1 / val_fraction), seed + 1)
    train = [question for question, fold in zip(questions, folds, strict=True) if fold != 0]
    val = [question for question, fold in zip(questions, folds, strict=True) if fold == 0]
    return train, val


def _group(question: Question) -> str:
    return " ".join(question.text.split()).casefold()
