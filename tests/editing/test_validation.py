"""Held-out scores are of unseen questions, intervals cover what they should, and chance is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lightning_peft.editing.probes import (
    LDAProbes,
    LogisticProbes,
    MassMeanProbes,
    Probes,
    cross_validate,
    permutation_null,
    top_k_stability,
)
from lightning_peft.editing.probes.scores import (
    accuracy_influence,
    auroc,
    auroc_influence,
    clustered_error,
    wilson,
)
from lightning_peft.editing.probes.validation import folds_of

Data = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def data() -> Data:
    """60 questions of 4 statements; head 2 knows the truth, head 1 somewhat."""
    generator = torch.Generator().manual_seed(0)
    x, y, question = torch.randn(240, 3, 4, generator=generator), torch.arange(240) % 2, torch.arange(240) // 4
    x[y == 1, 2, 0] += 3
    x[y == 1, 1, 0] += 1
    return x, y, question


def test_auroc_is_scikit_learns_with_ties_too() -> None:
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, 2, (80,), generator=generator)
    scores = torch.randint(0, 6, (80, 5), generator=generator).float()
    np.testing.assert_allclose(auroc(scores, y), [roc_auc_score(y, scores[:, g]) for g in range(5)])


def test_folds_are_even_and_keep_questions_whole(data: Data) -> None:
    _, _, question = data
    fold = folds_of(question, 7, seed=0)
    assert all(len(fold[question == q].unique()) == 1 for q in question.unique())
    sizes = torch.stack([fold[::4] == k for k in range(7)]).sum(1)
    assert int(sizes.max() - sizes.min()) <= 1
    assert torch.equal(fold, folds_of(question, 7, seed=0)) and not torch.equal(fold, folds_of(question, 7, seed=1))
    with pytest.raises(ValueError, match=r"^61 folds need at least two folds and as many questions; there are 60\.$"):
        folds_of(question, 61, seed=0)


def test_a_probe_that_learns_questions_by_heart_gains_nothing(data: Data) -> None:
    """Statements of one question are alike: split by statement a probe would look good that knows nothing."""
    x, _, question = data
    generator = torch.Generator().manual_seed(2)
    y = torch.randint(0, 2, (60,), generator=generator)[question]  # one truth value a question
    x = torch.randn(60, 3, 40, generator=generator)[question] + 0.01 * torch.randn(240, 3, 40, generator=generator)
    by_question = cross_validate(LDAProbes, x, y, question).accuracy
    by_statement = cross_validate(LDAProbes, x, y, torch.arange(240)).accuracy
    assert bool((by_question < 0.65).all()) and bool((by_statement > 0.8).all())


def test_every_row_is_judged_by_probes_that_have_not_seen_its_question(data: Data) -> None:
    x, y, question = data
    seen: list[set[int]] = []

    class Spy(MassMeanProbes):
        def fit(self, x: Tensor, y: Tensor) -> Spy:
            seen.append(set(x[:, 0, 3].tolist()))
            return super().fit(x, y)

        def decision_function(self, x: Tensor) -> Tensor:
            assert not seen[-1] & set(x[:, 0, 3].tolist())
            return super().decision_function(x)

    x[:, 0, 3] = question.float()  # so that a question shows
    report = cross_validate(Spy, x, y, question)
    assert len(seen) == 5 and report.decision.shape == (240, 3)
    torch.testing.assert_close(report.accuracy, ((report.decision > 0) == (y[:, None] == 1)).double().mean(0))
    assert bool((report.accuracy_low < report.accuracy).all() and (report.accuracy < report.accuracy_high).all())
    assert bool((report.auroc_low < report.auroc).all() and (report.auroc < report.auroc_high).all())
    assert report.accuracy[2] > 0.9 > report.accuracy[1] > 0.6 > report.accuracy[0]
    assert report.auroc[2] > 0.95 and abs(float(report.auroc[0]) - 0.5) < 0.15


def test_intervals_cover_the_truth_as_often_as_they_say_though_statements_depend_on_one_another() -> None:
    """Drawn 400 times: 50 questions of 6 statements that are mostly right or wrong together."""
    generator = torch.Generator().manual_seed(3)
    draws, share = 400, 0.7
    right = (torch.rand(50, draws, generator=generator) < share).repeat_interleave(6, 0)
    right = torch.where(torch.rand(300, draws, generator=generator) < 0.2, ~right, right)
    truth = share * 0.8 + (1 - share) * 0.2
    question, estimate = torch.arange(300) // 6, right.double().mean(0)
    low, high = wilson(estimate, clustered_error(accuracy_influence(right), question), 50)
    naive = (truth * (1 - truth) / 300) ** 0.5
    covered = float(((low <= truth) & (truth <= high)).double().mean())
    assert 0.92 <= covered <= 0.98
    assert float(((estimate - truth).abs() <= 1.96 * naive).double().mean()) < 0.8  # as if all were independent


def test_the_aurocs_error_is_what_draws_show() -> None:
    generator = torch.Generator().manual_seed(4)
    y, question = torch.arange(240) % 2, torch.arange(240) // 4
    scores = torch.randn(240, 500, generator=generator) + 0.8 * y[:, None]
    scores = scores + torch.randn(60, 500, generator=generator)[question] * (2.0 * y[:, None] - 1) * 0.7
    found = clustered_error(auroc_influence(scores, y), question)
    assert float(found.mean()) == pytest.approx(float(auroc(scores, y).std()), rel=0.1)


@pytest.mark.parametrize("estimate", [0.0, 1.0])
def test_all_right_and_all_wrong_have_intervals_too(estimate: float) -> None:
    low, high = wilson(torch.tensor([estimate]), torch.tensor([0.0]), 30)
    assert 0 <= float(low) < float(high) <= 1 and float(high - low) > 0.1


@pytest.mark.parametrize("make", [LDAProbes, LogisticProbes])
def test_a_head_that_knows_beats_chance_and_others_do_not(data: Data, make: type[Probes]) -> None:
    null = permutation_null(make, *data, rounds=19)
    assert null.best.shape == (19,) and float(null.best.max()) < 0.75
    assert float(null.p_value[2]) == pytest.approx(1 / 20) and float(null.p_value[0]) > 0.2


def test_shuffling_keeps_each_questions_number_of_true_statements(data: Data) -> None:
    x, y, question = data
    y = ((torch.arange(240) % 4 == 0) & (question % 2 == 0) | (torch.arange(240) % 4 != 0) & (question % 2 == 1)).long()
    order = torch.randperm(240, generator=torch.Generator().manual_seed(5))
    x, y, question = x[order], y[order], question[order]
    drawn: list[Tensor] = []

    class Spy(MassMeanProbes):
        def fit(self, x: Tensor, y: Tensor) -> Spy:
            drawn.append(y.clone())
            return super().fit(x, y)

    permutation_null(Spy, x, y, question, rounds=2, folds=2, seed=0)
    fold = folds_of(question, 2, seed=0)
    for i, labels in enumerate(drawn):  # folds 0 and 1 held out in turn, first with the true labels
        rows = fold != i % 2
        per_question = torch.zeros(60).index_add(0, question[rows], labels.float())
        expected = torch.zeros(60).index_add(0, question[rows], y[rows].float())
        assert torch.equal(per_question, expected)
        assert torch.equal(labels, y[rows]) == (i < 2)


def test_truth_that_cannot_be_shuffled_is_an_error(data: Data) -> None:
    x, _, question = data
    with pytest.raises(ValueError, match=r"^Every question has statements of one class only: truth cannot be shuff"):
        permutation_null(LDAProbes, x, question % 2, question)


def test_a_clear_head_is_always_chosen_and_equal_ones_share_a_place() -> None:
    generator = torch.Generator().manual_seed(6)
    question = torch.arange(400) // 4
    share = torch.tensor([0.95, 0.7, 0.7, 0.7, 0.3])
    correct = torch.rand(400, 5, generator=generator) < share
    for head in (2, 3):  # as often right as head 1, on other questions
        correct[:, head] = correct[:, 1].roll(100 * head)
    found = top_k_stability(correct, question, k=2)
    assert found.inclusion[0] == 1 and found.inclusion[4] == 0
    assert float(found.inclusion.sum()) == pytest.approx(2)
    assert bool((found.inclusion[1:4] > 0.1).all()) and 0.5 < found.overlap < 1
    with pytest.raises(ValueError, match=r"^k is 6, but there are 5 heads\.$"):
        top_k_stability(correct, question, k=6)


def test_a_fold_of_one_class_is_an_error() -> None:
    x, y = torch.randn(8, 1, 2), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"part of fold \d has examples of one class only: take fewer folds\.$"):
        cross_validate(LDAProbes, x, y, torch.arange(8) // 2, folds=4)
