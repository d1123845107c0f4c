"""Counts, means and covariances of head outputs: all that closed-form probes, directions and spreads need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_peft.editing.examples import check_examples
from lightning_peft.files.atomic import new_file


@dataclass(frozen=True)
class Moments:
    """What is kept of the examples of each class, for G heads of width d.

    Two of them add up exactly to those of all their examples, and subtract, so any split follows from its parts.

    Args:
        count: `[2]`, examples of class 0 and of class 1, float64.
        mean: `[2, G, d]` float64.
        scatter: `[2, G, d, d]` float64, the sum of squared deviations from the class's own mean.

    Example:
        >>> x, y = torch.randn(6, 1, 2), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> parts = Moments.of(x[:2], y[:2]) + Moments.of(x[2:], y[2:])
        >>> torch.allclose(parts.scatter, Moments.of(x, y).scatter)
        True
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """Of examples `x [N, G, d]` with labels `y [N]`, 0 or 1; a class may be empty."""
        counts, means, scatters = [], [], []
        for label in (0, 1):
            rows = x[y == label].double().transpose(0, 1)  # [G, n, d]
            counts.append(rows.new_tensor(float(rows.shape[1])))
            means.append(rows.sum(1) / max(rows.shape[1], 1))
            rows = rows - means[-1][:, None]
            scatters.append(torch.bmm(rows.mT, rows))
        return cls(torch.stack(counts), torch.stack(means), torch.stack(scatters))

    def __add__(self, other: Moments) -> Moments:
        return self._combine(other, 1.0)

    def __sub__(self, other: Moments) -> Moments:
        """Without the examples of `other`, which must be among these."""
        return self._combine(other, -1.0)

    def _combine(self, other: Moments, sign: float) -> Moments:
        # Chan, Golub and LeVeque 1979: nothing cancels, as it would in sums of squares
        count = self.count + sign * other.count
        if (count < 0).any():
            raise ValueError("More examples cannot be taken away than there are.")
        share = (sign * other.count / count.clamp(min=1))[:, None, None]
        shift = other.mean - self.mean
        mean = torch.where(count[:, None, None] > 0, self.mean + share * shift, torch.zeros_like(shift))
        # n_a * n_b / n, whichever of the three is the sum of the other two
        weight = (sign * self.count * other.count / count.clamp(min=1))[:, None, None, None]
        scatter = self.scatter + sign * other.scatter + weight * shift[..., :, None] * shift[..., None, :]
        return Moments(count, mean, torch.where(count[:, None, None, None] > 0, scatter, torch.zeros_like(scatter)))

    @property
    def within(self) -> Tensor:
        """Covariance about the class's own mean, both classes pooled (ddof 0), `[G, d, d]`."""
        return self.scatter.sum(0) / self.count.sum()

    @property
    def overall_mean(self) -> Tensor:
        """`[G, d]`."""
        return (self.count[:, None, None] * self.mean).sum(0) / self.count.sum()

    @property
    def overall(self) -> Tensor:
        """Covariance of all examples, whatever their class (ddof 0), `[G, d, d]`."""
        share = self.count / self.count.sum()
        shift = self.mean[1] - self.mean[0]
        return self.within + share[0] * share[1] * shift[..., :, None] * shift[..., None, :]

    def spread(self, directions: Tensor) -> Tensor:
        """Standard deviation (ddof 0) of all examples along unit `directions [G, d]`: ITI's sigma, `[G]`."""
        directions = directions.double()
        return torch.einsum("gd,gde,ge->g", directions, self.overall, directions).clamp(min=0).sqrt()

    def check(self) -> None:
        """Refuse moments of one class, or that are not finite."""
        if (self.count == 0).any():
            empty = int((self.count == 0).nonzero()[0])
            raise ValueError(f"A probe needs examples of both classes, 0 and 1; there is none of class {empty}.")
        if not torch.isfinite(self.scatter).all():
            group = int((~torch.isfinite(self.scatter)).flatten(2).any(-1).any(0).nonzero()[0])
            raise ValueError(f"The activations of probe {group} contain NaN or infinite values.")


class GroupedMoments:
    """Moments of each group of questions, gathered batch after batch while no activation is kept.

    Groups are folds, as a rule: memory is `2 * G * d * d` float64 numbers for each (for 1,024 heads of 128, 268 MB).

    Example:
        >>> gathered = GroupedMoments()
        >>> x, y, fold = torch.randn(8, 3, 4), torch.arange(8) % 2, torch.arange(8) // 4
        >>> gathered.update(x, y, fold)
        >>> gathered.pooled(without=[1]).count
        tensor([2., 2.], dtype=torch.float64)
    """

    def __init__(self, of: dict[int, Moments] | None = None) -> None:
        self.of: dict[int, Moments] = dict(of or {})

    def update(self, x: Tensor, y: Tensor, group: Tensor) -> None:
        """Add examples.

        Args:
            x: `[N, G, d]` or `[N, layers, heads, d]`.
            y: `[N]`, 0 or 1.
            group: `[N]`, which group each belongs to.

        Raises:
            ValueError: rows that do not match, other labels, or values that are not finite.
        """
        if not len(x) == len(y) == len(group):
            raise ValueError(f"{len(x)} activations, {len(y)} labels and {len(group)} groups were given: one a row.")
        if not set(y.unique().tolist()) <= {0, 1}:
            raise ValueError(f"Labels are 0 or 1, but these are {sorted(y.unique().tolist())}.")
        x = x.reshape(len(x), -1, x.shape[-1])
        check_examples(x)
        for key in group.unique().tolist():
            rows = group == key
            added = Moments.of(x[rows], y[rows])
            self.of[key] = self.of[key] + added if key in self.of else added

    def pooled(self, groups: Iterable[int] | None = None, without: Iterable[int] = ()) -> Moments:
        """Moments of some groups together: those named, or all, but for those left out.

        Raises:
            ValueError: a group that was never seen, or none left.
        """
        chosen = list(self.of) if groups is None else list(groups)
        left_out = list(without)
        if unknown := [key for key in (*chosen, *left_out) if key not in self.of]:
            raise ValueError(f"Group {unknown[0]} was not seen; there are {sorted(self.of)}.")
        chosen = [key for key in chosen if key not in left_out]
        if not chosen:
            raise ValueError("No group is left.")
        total = self.of[chosen[0]]
        for key in chosen[1:]:
            total = total + self.of[key]
        return total

    def merge(self, other: GroupedMoments) -> None:
        """Add what another has gathered, from another part of the data."""
        for key, moments in other.of.items():
            self.of[key] = self.of[key] + moments if key in self.of else moments

    def gather(self) -> None:
        """Add what the other ranks have gathered, so that every rank has all; without ranks, nothing."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        ranks: list[dict[int, Moments]] = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(ranks, self.of)
        self.of = {}
        for found in ranks:  # in the same order everywhere, so that all end with the same bits
            self.merge(GroupedMoments(found))

    def save(self, path: str | Path) -> None:
        """Write them to a safetensors file."""
        from safetensors.torch import save_file

        tensors = {
            f"{key}.{name}": getattr(moments, name).cpu().contiguous()
            for key, moments in self.of.items()
            for name in ("count", "mean", "scatter")
        }
        with new_file(path) as made:
            save_file(tensors, made)

    @classmethod
    def load(cls, path: str | Path) -> GroupedMoments:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is damaged, or holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        names = ("count", "mean", "scatter")
        try:
            tensors = load_file(path)
            keys = {int(name.partition(".")[0]) for name in tensors}
            return cls({key: Moments(*(tensors[f"{key}.{name}"] for name in names)) for key in sorted(keys)})
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} does not hold moments as they were saved: gather and save them again.") from error
