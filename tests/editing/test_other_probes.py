"""Probes without iteration are scikit-learn's; those without labels or without a plane find what they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lightning_peft.editing.probes import (
    CCSProbes,
    LDAProbes,
    LogisticProbes,
    MassMeanProbes,
    MLPProbes,
    Probes,
    RidgeProbes,
)

N, GROUPS, WIDTH = 120, 4, 5
ALL = (LogisticProbes, MassMeanProbes, LDAProbes, RidgeProbes, MLPProbes)


@pytest.fixture
def y() -> Tensor:
    return (torch.rand(N, generator=torch.Generator().manual_seed(1)) > 0.4).long()


@pytest.fixture
def x(y: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, GROUPS, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    return x + y[:, None, None] * torch.linspace(0, 2, GROUPS)[:, None] * torch.randn(WIDTH, generator=generator) + 3


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_lda_is_scikit_learns(x: Tensor, y: Tensor, shrinkage: float) -> None:
    probes = LDAProbes(shrinkage).fit(x, y)
    for group in range(GROUPS):
        other = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x[:, group].double(), y)
        np.testing.assert_allclose(probes.coef_[group], other.coef_[0], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(probes.intercept_[group], other.intercept_[0], rtol=1e-6, atol=1e-8)
        probability = other.predict_proba(x[:, group].double())[:, 1]
        np.testing.assert_allclose(probes.predict_proba(x)[:, group], probability, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 100.0])
def test_ridge_is_scikit_learns(x: Tensor, y: Tensor, alpha: float) -> None:
    probes = RidgeProbes(alpha).fit(x, y)
    for group in range(GROUPS):
        z = StandardScaler().fit_transform(x[:, group].double())
        decision = RidgeClassifier(alpha=alpha, solver="cholesky").fit(z, y).decision_function(z)
        np.testing.assert_allclose(probes.decision_function(x)[:, group], decision, rtol=1e-6, atol=1e-8)
    assert torch.equal(probes.predict_proba(x) > 0.5, probes.predict(x) == 1)


def test_mass_mean_points_from_class_to_class_and_its_probabilities_are_one_dimensional_ldas(
    x: Tensor, y: Tensor
) -> None:
    probes = MassMeanProbes().fit(x, y)
    for group in range(GROUPS):
        z = x[:, group].double()
        shift = z[y == 1].mean(0) - z[y == 0].mean(0)
        assert float(torch.cosine_similarity(probes.coef_[group], shift, dim=0)) == pytest.approx(1)
        line = (z @ shift)[:, None]
        probability = LinearDiscriminantAnalysis(solver="lsqr").fit(line, y).predict_proba(line)[:, 1]
        np.testing.assert_allclose(probes.predict_proba(x)[:, group], probability, atol=1e-6)


def test_lda_undoes_correlation_that_misleads_the_mass_mean() -> None:
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(400) % 2
    noise = torch.randn(400, 1, generator=generator)
    x = torch.cat([noise * 10 + y[:, None], noise * 10 + 0.1 * torch.randn(400, 1, generator=generator)], 1)[:, None]
    assert MassMeanProbes().fit(x, y).score(x, y) < 0.7
    assert LDAProbes().fit(x, y).score(x, y) > 0.95


@pytest.mark.parametrize("make", ALL)
def test_every_probe_keeps_to_one_meaning_of_its_answers(x: Tensor, y: Tensor, make: type[Probes]) -> None:
    probes = make().fit(x, y)
    decision, probability = probes.decision_function(x), probes.predict_proba(x)
    assert decision.shape == probability.shape == (N, GROUPS)
    assert torch.equal(probes.predict(x) == 1, decision > 0) and torch.equal(decision > 0, probability > 0.5)
    assert probes.score(x, y)[-1] > 0.8 and bool((probes.log_loss(x, y) > 0).all())
    for group in range(GROUPS):
        assert float(probes.auroc(x, y)[group]) == pytest.approx(roc_auc_score(y, decision[:, group]))


@pytest.mark.parametrize("make", [MassMeanProbes, LDAProbes, RidgeProbes])
def test_heads_fitted_together_equal_heads_fitted_alone(x: Tensor, y: Tensor, make: type[Probes]) -> None:
    together = make().fit(x, y).decision_function(x)
    alone = torch.cat([make().fit(x[:, [g]], y).decision_function(x[:, [g]]) for g in range(GROUPS)], 1)
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("make", [*ALL, CCSProbes])
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing_and_are_given_back(
    x: Tensor, y: Tensor, make: type[Probes], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_peft.editing.probes import ccs, logistic, mlp

    for module, name, value in ((logistic, "_CACHE_BYTES", 1), (mlp, "_BLOCK", 2), (ccs, "_BLOCK", 2)):
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


def test_an_mlp_separates_what_no_plane_does_and_follows_its_seed() -> None:
    x = torch.randn(300, 2, 3, generator=torch.Generator().manual_seed(0))
    y = (x[:, 1, 0] * x[:, 1, 1] > 0).long()
    probes = MLPProbes(weight_decay=0.0).fit(x, y)
    assert probes.score(x, y)[1] > 0.95 > 0.7 > LogisticProbes().fit(x, y).score(x, y)[1]
    again = MLPProbes(weight_decay=0.0).fit(x, y)
    assert torch.equal(again.decision_function(x), probes.decision_function(x))


def test_an_mlp_is_fitted_where_gradients_are_off(x: Tensor, y: Tensor) -> None:
    with torch.no_grad():
        assert MLPProbes(epochs=20).fit(x, y).score(x, y)[-1] > 0.8


@pytest.mark.parametrize("make", ALL)
def test_wrong_shapes_are_one_sentence(x: Tensor, y: Tensor, make: type[Probes]) -> None:
    with pytest.raises(
        ValueError, match=r"^Probes take features \[N, groups, features\], but these have shape \(120, "
    ):
        make().fit(x[:, 0], y)
    with pytest.raises(ValueError, match=r"^120 examples need 120 labels, but the labels have shape \(119,\)\.$"):
        make().fit(x, y[1:])
