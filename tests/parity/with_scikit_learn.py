"""Probes and directions beside scikit-learn, on the head outputs of tiny models; both are computed when a row is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import sklearn
import torch
from parity.comparison import Comparison, Difference
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler
from tiny_models import VOCABULARY, tiny
from torch import Tensor

from lightning_peft.editing import head_sites
from lightning_peft.editing.collect import capture_tokens
from lightning_peft.editing.directions import contrast_pairs, mass_mean, principal, projection_std
from lightning_peft.editing.probes import LogisticProbes

KINDS = ("llama", "gpt2", "opt")
OPTIMUM = {"solver": "newton-cholesky", "tol": 1e-12, "max_iter": 1000}


def comparisons() -> list[Comparison]:
    """Return a row for each formula and architecture."""
    steps: list[tuple[str, str, Callable[[str], Difference], float, str]] = [
        ("LogisticProbes(standardize=False)", "LogisticRegression, newton-cholesky", plain_probes, 1e-6, ""),
        ("LogisticProbes(C=0.1)", "StandardScaler, LogisticRegression", scaled_probes, 1e-6, "mapped to raw features"),
        (
            "LogisticProbes(standardize=False)",
            "LogisticRegression() as it is",
            default_probes,
            1e-2,
            "its lbfgs stops at a gradient of 1e-4, short of the optimum",
        ),
        ("LogisticProbes.score", "LogisticRegression.score", accuracies, 1e-12, ""),
        ("mass_mean", "NearestCentroid", centroids, 5e-6, "difference of centroids, unit length; float32"),
        ("principal(x, y)", "PCA(1)", components, 1e-6, "the sign is set by the labels here"),
        (
            "principal(x, y, pairs)",
            "PCA(1)",
            pair_components,
            1e-6,
            "PCA of the differences in both orders: here they are about 0, PCA alone centres them",
        ),
        ("projection_std", "StandardScaler.scale_", spreads, 1e-6, "ddof 0"),
    ]
    return [
        Comparison(
            ours, f"scikit-learn {sklearn.__version__}, {theirs}", kind, partial(step, kind), outputs=most, note=note
        )
        for kind in KINDS
        for ours, theirs, step, most, note in steps
    ]


@cache
def examples(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return head outputs `[N, G, d]`, labels and groups `[N]` of statements whose last token tells a part of them."""
    model, generator = tiny(kind).eval(), torch.Generator().manual_seed(1)
    labels = torch.arange(240) % 2
    texts = torch.randint(3, VOCABULARY, (240, 4), generator=generator)
    telling = torch.rand(240, generator=generator) < 0.7
    texts[:, -1] = torch.where(telling, 3 + 8 * labels + texts[:, -1] % 4, texts[:, -1])
    heads = capture_tokens(model, head_sites(model), texts.tolist()).flatten(1, 2)
    return heads / heads.std(), labels, torch.arange(240) // 4


def relative(ours: Tensor, theirs: np.ndarray) -> Difference:
    """Return the largest difference over the largest value of scikit-learn's."""
    assert ours.shape == theirs.shape
    return Difference(float(np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max()))


def each_head(kind: str, function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Return a function of every head's features and the labels, in double precision, stacked."""
    x, y, _ = examples(kind)
    return np.stack([function(x[:, head].double().numpy(), y.numpy()) for head in range(x.shape[1])])


def planes(probes: LogisticProbes) -> Tensor:
    return torch.cat([probes.coef_, probes.intercept_[:, None]], 1)


def plain_probes(kind: str) -> Difference:
    def fit(z: np.ndarray, y: np.ndarray) -> np.ndarray:
        probe = LogisticRegression(**OPTIMUM).fit(z, y)
        return np.append(probe.coef_[0], probe.intercept_)

    x, y, _ = examples(kind)
    return relative(planes(LogisticProbes(standardize=False).fit(x, y)), each_head(kind, fit))


def default_probes(kind: str) -> Difference:
    def fit(z: np.ndarray, y: np.ndarray) -> np.ndarray:
        probe = LogisticRegression().fit(z, y)
        return np.append(probe.coef_[0], probe.intercept_)

    x, y, _ = examples(kind)
    return relative(planes(LogisticProbes(standardize=False).fit(x, y)), each_head(kind, fit))


def scaled_probes(kind: str) -> Difference:
    def fit(z: np.ndarray, y: np.ndarray) -> np.ndarray:
        scaler = StandardScaler().fit(z)
        probe = LogisticRegression(C=0.1, **OPTIMUM).fit(scaler.transform(z), y)
        coef = probe.coef_[0] / scaler.scale_
        return np.append(coef, probe.intercept_ - coef @ scaler.mean_)

    x, y, _ = examples(kind)
    return relative(planes(LogisticProbes(C=0.1).fit(x, y)), each_head(kind, fit))


def accuracies(kind: str) -> Difference:
    def fit(z: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.array(LogisticRegression(**OPTIMUM).fit(z[:160], y[:160]).score(z[160:], y[160:]))

    x, y, _ = examples(kind)
    ours = LogisticProbes(standardize=False).fit(x[:160], y[:160]).score(x[160:], y[160:])
    wrong = (ours.double() * 80).round() - torch.from_numpy(each_head(kind, fit) * 80).round()  # of 80 statements
    return Difference(float(wrong.abs().max() / 80))


def centroids(kind: str) -> Difference:
    def fit(z: np.ndarray, y: np.ndarray) -> np.ndarray:
        false, true = NearestCentroid().fit(z, y).centroids_
        return (true - false) / np.linalg.norm(true - false)

    return relative(mass_mean(*examples(kind)[:2]), each_head(kind, fit))


def components(kind: str) -> Difference:
    x, y, _ = examples(kind)
    theirs = each_head(kind, lambda z, _: PCA(1).fit(z).components_[0])
    return relative(towards(principal(x, y), theirs), theirs)


def pair_components(kind: str) -> Difference:
    x, y, groups = examples(kind)
    pairs = contrast_pairs(y, groups)
    first, second = pairs.numpy().T

    def fit(z: np.ndarray, _: np.ndarray) -> np.ndarray:
        differences = z[first] - z[second]
        return PCA(1).fit(np.concatenate([differences, -differences])).components_[0]

    theirs = each_head(kind, fit)
    return relative(towards(principal(x, y, pairs), theirs), theirs)


def towards(ours: Tensor, theirs: np.ndarray) -> Tensor:
    """Turn directions to the side that scikit-learn's are on."""
    return ours * torch.from_numpy(np.sign((ours.numpy() * theirs).sum(-1, keepdims=True)))


def spreads(kind: str) -> Difference:
    x, y, _ = examples(kind)
    directions = mass_mean(x, y)
    along = torch.einsum("ngd,gd->ng", x.double(), directions.double())
    return relative(projection_std(x, directions), StandardScaler().fit(along.numpy()).scale_)
