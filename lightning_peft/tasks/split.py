"""Which part of a task's units a cell learns from and which it is tested on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """A fold of folds: what is learnt from is outside it, what is tested is in it.

    Args:
        fold: the fold that is tested, from 0.
        folds: how many there are; every unit is in one of them. 1 where the task has a test set of its own, which is
            tested by modules that have learnt from all else.
        seed: of the split.
        size: take only so many units to learn from; a smaller size's are among a larger one's. None for all.
        inner: learn from the inner training units and test on the inner validation units, both outside the fold: what
            strengths and other settings are chosen on.

    Raises:
        ValueError: the fold is not one of the folds, or there is none.

    Example:
        >>> Split(fold=1).folds
        2
        >>> Split(fold=2)
        Traceback (most recent call last):
        ValueError: fold must be from 0 to 1, got 2.
    """

    fold: int = 0
    folds: int = 2
    seed: int = 0
    size: int | None = None
    inner: bool = False

    def __post_init__(self) -> None:
        if self.folds < 1:
            raise ValueError(
                f"folds must be at least 2, so that tests are on unseen units, or 1 for a test set of its own, got "
                f"{self.folds}."
            )
        if not 0 <= self.fold < self.folds:
            raise ValueError(f"fold must be from 0 to {self.folds - 1}, got {self.fold}.")
