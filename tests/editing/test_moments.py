"""Streamed moments give exactly what the stored activations give, for any split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from damage import DAMAGES
from torch import Tensor

from lightning_peft.editing.directions import mass_mean, projection_std
from lightning_peft.editing.moments import GroupedMoments, Moments
from lightning_peft.editing.probes import LDAProbes, MassMeanProbes, RidgeProbes

N, LAYERS, HEADS, WIDTH, FOLDS = 120, 2, 3, 5, 4


@pytest.fixture
def x() -> Tensor:
    """Far from 0, so that sums of squares would cancel."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    return torch.randn(N, LAYERS, HEADS, WIDTH, generator=generator) @ mixing + 100


@pytest.fixture
def y() -> Tensor:
    return (torch.rand(N, generator=torch.Generator().manual_seed(1)) > 0.4).long()


@pytest.fixture
def fold() -> Tensor:
    return torch.arange(N) // 3 % FOLDS


@pytest.fixture
def gathered(x: Tensor, y: Tensor, fold: Tensor) -> GroupedMoments:
    found = GroupedMoments()
    for rows in torch.randperm(N, generator=torch.Generator().manual_seed(2)).split(7):
        found.update(x[rows], y[rows], fold[rows])
    return found


@pytest.mark.parametrize("left_out", [(), (0,), (1, 3)])
def test_every_split_follows_to_a_millionth(
    x: Tensor, y: Tensor, fold: Tensor, gathered: GroupedMoments, left_out: tuple[int, ...]
) -> None:
    rows = ~torch.isin(fold, torch.tensor(left_out, dtype=torch.long))
    stored, labels = x[rows].flatten(1, 2).double(), y[rows]
    streamed = gathered.pooled(without=left_out)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(mass_mean(streamed), mass_mean(stored, labels), **close)
    directions = mass_mean(stored, labels)
    torch.testing.assert_close(streamed.spread(directions), projection_std(stored, directions), **close)
    for make in (MassMeanProbes, LDAProbes, RidgeProbes):
        from_stream, from_store = make().fit_moments(streamed), make().fit(stored, labels)
        torch.testing.assert_close(from_stream.coef_, from_store.coef_, **close)
        torch.testing.assert_close(from_stream.intercept_, from_store.intercept_, rtol=1e-6, atol=1e-5)
        assert torch.equal(from_stream.predict(stored), from_store.predict(stored))


def test_a_fold_taken_away_leaves_the_others(gathered: GroupedMoments) -> None:
    rest, expected = gathered.pooled() - gathered.of[2], gathered.pooled(without=[2])
    for name in ("count", "mean", "scatter"):
        torch.testing.assert_close(getattr(rest, name), getattr(expected, name), rtol=1e-9, atol=1e-9)


def test_covariances_are_torchs(x: Tensor, y: Tensor) -> None:
    z = x.flatten(1, 2).double()
    moments = Moments.of(z, y)
    for head in range(LAYERS * HEADS):
        torch.testing.assert_close(moments.overall[head], torch.cov(z[:, head].T, correction=0))
        parts = [torch.cov(z[y == label, head].T, correction=0) * int((y == label).sum()) for label in (0, 1)]
        torch.testing.assert_close(moments.within[head], (parts[0] + parts[1]) / N)
    torch.testing.assert_close(moments.overall_mean, z.mean(0))


def test_a_class_that_comes_later_is_welcome(x: Tensor, y: Tensor) -> None:
    z = x.flatten(1, 2)
    parts = Moments.of(z[y == 1], y[y == 1]) + Moments.of(z[y == 0], y[y == 0])
    torch.testing.assert_close(parts.mean, Moments.of(z, y).mean)
    with pytest.raises(ValueError, match=r"^A probe needs examples of both classes, 0 and 1; there is none of class 0"):
        LDAProbes().fit_moments(Moments.of(z[y == 1], y[y == 1]))


def test_two_halves_merge_and_a_file_gives_back_what_was_saved(
    x: Tensor, y: Tensor, fold: Tensor, gathered: GroupedMoments, tmp_path: Path
) -> None:
    one, other = GroupedMoments(), GroupedMoments()
    one.update(x[:50], y[:50], fold[:50])
    other.update(x[50:], y[50:], fold[50:])
    one.merge(other)
    one.save(tmp_path / "moments.safetensors")
    loaded = GroupedMoments.load(tmp_path / "moments.safetensors")
    assert list(loaded.of) == [0, 1, 2, 3] and [p.name for p in tmp_path.iterdir()] == ["moments.safetensors"]
    for key, moments in loaded.of.items():
        assert torch.equal(moments.scatter, one.of[key].scatter)
        torch.testing.assert_close(moments.scatter, gathered.of[key].scatter)


def test_what_does_not_fit_is_an_error(x: Tensor, y: Tensor, fold: Tensor, gathered: GroupedMoments) -> None:
    with pytest.raises(ValueError, match=r"^120 activations, 119 labels and 120 groups were given: one a row\.$"):
        gathered.update(x, y[1:], fold)
    with pytest.raises(ValueError, match=r"^Group 9 was not seen; there are \[0, 1, 2, 3\]\.$"):
        gathered.pooled(without=[9])
    with pytest.raises(ValueError, match=r"^No group is left\.$"):
        gathered.pooled(without=range(FOLDS))
    x[4, 1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^The activations of probe 5 contain NaN or infinite values\.$"):
        gathered.update(x, y, fold)


@pytest.mark.parametrize("damage", ["emptied", "truncated", "other type"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "moments.safetensors"
    moments = GroupedMoments()
    moments.update(torch.randn(6, 1, 4), torch.tensor([0, 1] * 3), torch.zeros(6, dtype=torch.long))
    moments.save(path)
    DAMAGES[damage](path)
    with pytest.raises(ValueError, match=f"^{path} does not hold moments as they were saved"):
        GroupedMoments.load(path)
