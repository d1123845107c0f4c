"""How good probes are on unseen questions, how good they would be by chance, and how firm their ranking is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.editing.examples import check_examples
from lightning_peft.editing.probes.linear import Probes
from lightning_peft.editing.probes.scores import accuracy_influence, auroc, auroc_influence, clustered_error, wilson


@dataclass(frozen=True)
class ProbeReport:
    """Every head's probe on held-out questions. All `[G]`, but for what says otherwise.

    Args:
        accuracy: share of examples on the right side.
        accuracy_low: lower end of its interval.
        accuracy_high: upper end.
        auroc: area under the ROC curve, within folds, so that folds need not share a scale.
        auroc_low: lower end of its interval.
        auroc_high: upper end.
        decision: `[N, G]`, each example's decision by the probe that has not seen its question.
    """

    accuracy: Tensor
    accuracy_low: Tensor
    accuracy_high: Tensor
    auroc: Tensor
    auroc_low: Tensor
    auroc_high: Tensor
    decision: Tensor


@dataclass(frozen=True)
class PermutationNull:
    """What probes reach when truth is dealt out at random within questions.

    Args:
        best: `[rounds]`, the best head's accuracy in each round.
        p_value: `[G]`, the chance that the best of all heads does as well as this one if truth means nothing.
    """

    best: Tensor
    p_value: Tensor


@dataclass(frozen=True)
class Stability:
    """How firm the choice of the best K heads is when other questions are drawn.

    Args:
        inclusion: `[G]`, the share of draws in which a head is among the best K.
        overlap: mean share of the K chosen heads that a draw chooses too.
    """

    inclusion: Tensor
    overlap: float


def folds_of(groups: Tensor, folds: int, seed: int) -> Tensor:
    """The fold of each row, `[N]`: groups stay whole, and folds have equally many of them, give or take one.

    Raises:
        ValueError: fewer groups than folds, or fewer than two folds.
    """
    unique, index = groups.unique(return_inverse=True)
    if not 2 <= folds <= len(unique):
        raise ValueError(f"{folds} folds need at least two folds and as many questions; there are {len(unique)}.")
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed))
    return (order % folds).to(index.device)[index]


def cross_validate(
    make: Callable[[], Probes],
    x: Tensor,
    y: Tensor,
    groups: Tensor,
    folds: int = 5,
    seed: int = 0,
    confidence: float = 0.95,
) -> ProbeReport:
    """Fit probes on all folds but one and ask them about that one, in turn.

    Intervals are for the questions at hand being a sample of such questions: statements of one question count as one
    cluster. They say nothing of the fits' own variation.

    Args:
        make: gives unfitted probes, e.g. `LogisticProbes` or `lambda: LDAProbes(shrinkage=0.1)`.
        x: `[N, G, d]` features.
        y: `[N]`, 0 or 1.
        groups: `[N]`, the question of each example.
        folds: how many.
        seed: of the folds.
        confidence: of the intervals.

    Example:
        >>> from lightning_peft.editing.probes import LDAProbes
        >>> x, y = torch.randn(60, 2, 3, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2
        >>> x[y == 1, 1] += 3
        >>> report = cross_validate(LDAProbes, x, y, groups=torch.arange(60) // 4)
        >>> bool(report.accuracy_low[1] > 0.75 > report.accuracy[0])
        True
    """
    check_examples(x, y)
    decision = x.new_empty(x.shape[:2], dtype=torch.float64)
    area, influence, pairs = torch.zeros_like(decision[0]), torch.zeros_like(decision), 0
    for train, held in _splits(y, folds_of(groups, folds, seed)):
        decision[held] = make().fit(x[train], y[train]).decision_function(x[held]).double()
        weight = int((y[held] == 1).sum()) * int((y[held] == 0).sum())
        area = area + weight * auroc(decision[held], y[held])
        influence[held] = weight * auroc_influence(decision[held], y[held])
        pairs += weight
    correct = (decision > 0) == (y[:, None] == 1)
    count = len(groups.unique())
    accuracy, area = correct.double().mean(0), area / pairs
    spread = clustered_error(accuracy_influence(correct), groups)
    low, high = wilson(accuracy, spread, count, confidence)
    area_low, area_high = wilson(area, clustered_error(influence / pairs, groups), count, confidence)
    return ProbeReport(accuracy, low, high, area, area_low, area_high, decision)


def permutation_null(
    make: Callable[[], Probes], x: Tensor, y: Tensor, groups: Tensor, rounds: int = 20, folds: int = 5, seed: int = 0
) -> PermutationNull:
    """Cross-validated accuracies once truth is shuffled among the statements of each question.

    Since the best head of many is looked at, it is compared with the best head of each round (Westfall and Young 1993).

    Args:
        make: as in `cross_validate`; every round fits anew, so probes in closed form are the ones to take.
        x: `[N, G, d]` features.
        y: `[N]`, 0 or 1.
        groups: `[N]`, the question of each example.
        rounds: how many shufflings; the smallest p-value is `1 / (rounds + 1)`.
        folds: as in `cross_validate`.
        seed: of shufflings and folds.

    Raises:
        ValueError: every question has statements of one class only, so that nothing can be shuffled.
    """
    check_examples(x, y)
    generator = torch.Generator().manual_seed(seed)
    fold = folds_of(groups, folds, seed)
    found = _held_out_accuracy(make, x, y, fold)
    unique, index = groups.unique(return_inverse=True)
    true = torch.zeros(len(unique), device=y.device).index_add(0, index, y.float())
    sizes = index.bincount().float()
    if bool(((true == 0) | (true == sizes)).all()):
        raise ValueError("Every question has statements of one class only: truth cannot be shuffled within questions.")
    in_order = index.argsort(stable=True)  # rows, question by question
    best = []
    for _ in range(rounds):
        drawn = torch.rand(len(y), generator=generator, dtype=torch.float64).to(index.device)
        shuffled = torch.empty_like(y)
        shuffled[in_order] = y[(index + drawn).argsort()]
        best.append(_held_out_accuracy(make, x, shuffled, fold).max())
    null = torch.stack(best)
    p_value = (1 + (null[:, None] >= found[None] - 1e-12).sum(0)) / (1 + rounds)
    return PermutationNull(null, p_value)


def top_k_stability(correct: Tensor, groups: Tensor, k: int, rounds: int = 1000, seed: int = 0) -> Stability:
    """Draw questions with replacement, rank the heads anew, and see which stay among the best K.

    Args:
        correct: `[N, G]`, whether each held-out example is judged rightly.
        groups: `[N]`, the question of each example.
        k: how many heads are chosen.
        rounds: draws.
        seed: of the draws.

    Example:
        >>> correct = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 1]])
        >>> top_k_stability(correct, torch.tensor([0, 0, 1, 1]), k=1).inclusion
        tensor([1., 0., 0.], dtype=torch.float64)
    """
    heads = correct.shape[1]
    if not 1 <= k <= heads:
        raise ValueError(f"k is {k}, but there are {heads} heads.")
    unique, index = groups.unique(return_inverse=True)
    right = correct.new_zeros(len(unique), heads, dtype=torch.float64).index_add(0, index, correct.double())
    sizes = index.bincount().double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(unique), (rounds, len(unique)), generator=generator).to(index.device)
    times = torch.zeros(rounds, len(unique), dtype=torch.float64, device=index.device)
    times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    accuracy = (times @ right) / (times @ sizes)[:, None]
    chosen = torch.zeros_like(accuracy).scatter(1, _best(accuracy, k), 1.0)
    whole = _best((right.sum(0) / sizes.sum())[None], k)[0]
    return Stability(chosen.mean(0), float(chosen[:, whole].mean()))


def _best(accuracy: Tensor, k: int) -> Tensor:
    """The best k of each row; of equal ones the first, as a stable ranking has it."""
    return accuracy.argsort(dim=1, descending=True, stable=True)[:, :k]


def _splits(y: Tensor, fold: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for number in fold.unique().tolist():
        held = fold == number
        for name, rows in (("training", ~held), ("held-out", held)):
            if len(y[rows].unique()) < 2:
                raise ValueError(f"The {name} part of fold {number} has examples of one class only: take fewer folds.")
        yield ~held, held


def _held_out_accuracy(make: Callable[[], Probes], x: Tensor, y: Tensor, fold: Tensor) -> Tensor:
    right = x.new_zeros(x.shape[1], dtype=torch.float64)
    for train, held in _splits(y, fold):
        right += (make().fit(x[train], y[train]).predict(x[held]) == y[held][:, None]).double().sum(0)
    return right / len(y)
