"""All heads' probes, fitted together, are scikit-learn's logistic regressions at their optimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lightning_peft.editing import LogisticProbes
from lightning_peft.editing.probes import logistic

N, GROUPS, WIDTH = 90, 5, 6


@pytest.fixture
def labels() -> Tensor:
    return (torch.rand(N, generator=torch.Generator().manual_seed(1)) > 0.4).long()


@pytest.fixture
def features(labels: Tensor) -> Tensor:
    """`[N, G, d]` float32, as capture gives them: groups of different signal, features of different scale and mean."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, GROUPS, WIDTH, generator=generator)
    x += labels[:, None, None] * torch.linspace(0, 1.5, GROUPS)[:, None] * torch.randn(WIDTH, generator=generator)
    return x * torch.logspace(-2, 2, WIDTH) + torch.linspace(-3, 3, WIDTH)


def sklearn_probe(x: Tensor, y: Tensor, standardize: bool, C: float) -> tuple[np.ndarray, float, LogisticRegression]:
    """Coefficients and intercept in raw space, and the fitted estimator."""
    regression = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=1000)
    if not standardize:
        regression.fit(x.double(), y)
        return regression.coef_[0], regression.intercept_[0], regression
    estimator = make_pipeline(StandardScaler(), regression).fit(x.double(), y)
    scaler = estimator[0]
    coef = regression.coef_[0] / scaler.scale_
    return coef, regression.intercept_[0] - coef @ scaler.mean_, estimator


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_probes_equal_scikit_learn_at_the_optimum(
    features: Tensor, labels: Tensor, standardize: bool, C: float
) -> None:
    probes = LogisticProbes(C=C, standardize=standardize).fit(features, labels)
    assert probes.n_iter_ < probes.max_iter
    accuracy, loss = probes.score(features, labels), probes.log_loss(features, labels)
    for group in range(GROUPS):
        x = features[:, group]
        coef, intercept, estimator = sklearn_probe(x, labels, standardize, C)
        np.testing.assert_allclose(probes.coef_[group], coef, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(probes.intercept_[group], intercept, rtol=1e-6, atol=1e-8)
        assert float(accuracy[group]) == pytest.approx(estimator.score(x.double(), labels), abs=1e-7)
        assert torch.equal(probes.predict(features)[:, group], torch.from_numpy(estimator.predict(x.double())))
        probability = estimator.predict_proba(x.double())[:, 1]
        np.testing.assert_allclose(probes.predict_proba(features)[:, group], probability, atol=1e-7)
        assert float(loss[group]) == pytest.approx(log_loss(labels, probability), rel=1e-6)


def test_groups_differ_so_that_agreement_says_something(features: Tensor, labels: Tensor) -> None:
    accuracy = LogisticProbes().fit(features, labels).score(features, labels)
    assert accuracy[0] < 0.75 and accuracy[-1] > 0.9


def test_groups_fitted_together_equal_groups_fitted_alone(
    features: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = LogisticProbes().fit(features, labels)
    monkeypatch.setattr(logistic, "_CACHE_BYTES", 1)  # one group a block
    alone = LogisticProbes().fit(features, labels)
    torch.testing.assert_close(together.coef_, alone.coef_, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(together.intercept_, alone.intercept_, rtol=1e-8, atol=1e-10)


def test_separable_data_converge(labels: Tensor) -> None:
    x = torch.stack([labels * 20.0 - 10.0, torch.linspace(0, 1, N)], dim=-1)[:, None]
    probes = LogisticProbes(C=1e4).fit(x, labels)
    assert probes.n_iter_ < probes.max_iter and torch.isfinite(probes.coef_).all()
    assert probes.score(x, labels) == 1
    coef, _, _ = sklearn_probe(x[:, 0], labels, True, 1e4)
    np.testing.assert_allclose(probes.coef_[0], coef, rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_a_constant_feature_gets_no_weight(features: Tensor, labels: Tensor, value: float) -> None:
    x = features.double()
    x[:, :, 2] = value
    probes = LogisticProbes().fit(x, labels)
    assert float(probes.coef_[:, 2].abs().max()) < 1e-12
    coef, intercept, _ = sklearn_probe(x[:, -1], labels, True, 1.0)
    np.testing.assert_allclose(probes.coef_[-1], coef, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(probes.intercept_[-1], intercept, rtol=1e-6)


def test_more_features_than_examples_are_fitted(labels: Tensor) -> None:
    x = torch.randn(12, 2, 40, generator=torch.Generator().manual_seed(0))
    y = torch.arange(12) % 2
    probes = LogisticProbes().fit(x, y)
    np.testing.assert_allclose(probes.coef_[1], sklearn_probe(x[:, 1], y, True, 1.0)[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("given", "found"), [([0, 0, 0], "0"), ([1, 1, 1], "1"), ([1, -1, 1], "-1, 1"), ([0, 1, 2], "0, 1, 2")]
)
def test_labels_other_than_both_0_and_1_are_an_error(given: list[int], found: str) -> None:
    message = rf"^A probe needs examples of both classes, 0 and 1; the labels given are: {found}\.$"
    with pytest.raises(ValueError, match=message):
        LogisticProbes().fit(torch.randn(3, 1, 2), torch.tensor(given))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_an_error_naming_the_probe(
    features: Tensor, labels: Tensor, bad: float
) -> None:
    features[7, 3, 0] = bad
    with pytest.raises(ValueError, match=r"^The activations of probe 3 contain NaN or infinite values\.$"):
        LogisticProbes().fit(features, labels)


def test_a_penalty_that_is_not_positive_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^C must be positive, got 0\.$"):
        LogisticProbes(C=0)
