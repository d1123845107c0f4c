"""Contrast-consistent search finds what should be found without labels; what holds for every probe."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lightning_peft.editing.probes import CCSProbes, LinearProbes, LogisticProbes, ccs, logistic
from lightning_peft.editing.probes.linear import auroc

N, GROUPS, WIDTH = 120, 4, 5


@pytest.fixture
def y() -> Tensor:
    return (torch.rand(N, generator=torch.Generator().manual_seed(1)) > 0.4).long()


@pytest.fixture
def x(y: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, GROUPS, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    return x + y[:, None, None] * torch.linspace(0, 2, GROUPS)[:, None] * torch.randn(WIDTH, generator=generator) + 3


def test_auroc_is_scikit_learns_with_ties_too() -> None:
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, 2, (80,), generator=generator)
    scores = torch.randint(0, 6, (80, 5), generator=generator).float()
    np.testing.assert_allclose(auroc(scores, y), [roc_auc_score(y, scores[:, g]) for g in range(5)])


def test_a_probe_keeps_to_one_meaning_of_its_answers(x: Tensor, y: Tensor) -> None:
    probes = LogisticProbes().fit(x, y)
    decision, probability = probes.decision_function(x), probes.predict_proba(x)
    assert decision.shape == probability.shape == (N, GROUPS)
    assert torch.equal(probes.predict(x) == 1, decision > 0) and torch.equal(decision > 0, probability > 0.5)
    assert probes.score(x, y)[-1] > 0.8 and bool((probes.log_loss(x, y) > 0).all())
    for group in range(GROUPS):
        assert float(probes.auroc(x, y)[group]) == pytest.approx(roc_auc_score(y, decision[:, group]))


@pytest.mark.parametrize("make", [LogisticProbes, CCSProbes])
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing_and_are_given_back(
    x: Tensor, y: Tensor, make: type[LinearProbes], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, value in ((logistic, "_CACHE_BYTES", 1), (ccs, "_BLOCK", 2)):
        monkeypatch.setattr(module, name, value)
    before = torch.get_num_threads()
    more = {"pairs": torch.stack([(y == 0).nonzero()[:40, 0], (y == 1).nonzero()[:40, 0]], 1)}
    options = more if make is CCSProbes else {}
    expected = make().fit(x, y, **options).decision_function(x)
    try:
        torch.set_num_threads(threads)
        found = make().fit(x, y, **options).decision_function(x)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def contrast(signal: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of a true and a false statement in random order, and what all statements share."""
    generator = torch.Generator().manual_seed(4)
    y = torch.stack([first := torch.randint(0, 2, (60,), generator=generator), 1 - first], 1).flatten()
    x = torch.randn(120, 3, 4, generator=generator) + 5 * torch.randn(60, 3, 4, generator=generator).repeat_interleave(
        2, 0
    ) * torch.tensor([1.0, 0.0, 0.0, 0.0])
    x[:, :, 2] += signal * (2.0 * y - 1)[:, None]
    return x, y, torch.arange(120).reshape(60, 2)


def test_ccs_finds_truth_without_being_told_it() -> None:
    x, y, pairs = contrast(4.0)
    probes = CCSProbes().fit(x, pairs=pairs)
    accuracy = probes.score(x, y)
    assert bool((torch.maximum(accuracy, 1 - accuracy) > 0.95).all())
    assert bool((probes.loss_ < 0.1).all())
    assert bool((CCSProbes(max_iter=5, restarts=1).fit(x, pairs=pairs).loss_ > probes.loss_).all())


def test_ccs_takes_its_sign_from_labels() -> None:
    x, y, pairs = contrast(4.0)
    assert bool((CCSProbes().fit(x, y, pairs).score(x, y) > 0.95).all())
    assert bool((CCSProbes().fit(x, 1 - y, pairs).score(x, y) < 0.05).all())


def test_ccs_needs_pairs() -> None:
    x, y, pairs = contrast(1.0)
    with pytest.raises(ValueError, match=r"^CCS needs pairs \[P, 2\], at least two, of rows that cannot both be true"):
        CCSProbes().fit(x, y)
    with pytest.raises(ValueError, match=r"^Pairs name rows 0 to 119, but these go to 120\.$"):
        CCSProbes().fit(x, y, pairs + 1)


def test_wrong_shapes_are_one_sentence(x: Tensor, y: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"^Probes take features \[N, groups, features\], but these have shape \(120, "
    ):
        LogisticProbes().fit(x[:, 0], y)
    with pytest.raises(ValueError, match=r"^120 examples need 120 labels, but the labels have shape \(119,\)\.$"):
        LogisticProbes().fit(x, y[1:])
