"""A linear map whose matrix is a tensor train: a product of small cores, one for each factor of its two widths."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_NEAR = 8  # what a factor of a width is to be near


@dataclass(frozen=True)
class TrainShape:
    """How a matrix `[inputs, outputs]` is cut into cores `[r_{k-1}, n_k, r_k]`.

    Args:
        inputs: the factors n_k of the inputs.
        outputs: the factors n_k of the outputs.
        ranks: r_0 … r_K; the first and the last are 1.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ranks: tuple[int, ...]

    def cores(self) -> list[tuple[int, int, int]]:
        """Return the shapes of the cores."""
        return list(zip(self.ranks, self.inputs + self.outputs, self.ranks[1:], strict=False))

    def count(self) -> int:
        """Return the number of entries, `Σ r_{k-1} n_k r_k`."""
        return sum(map(math.prod, self.cores()))


def train_shape(inputs: int, outputs: int, rank: int) -> TrainShape:
    """Choose the train of a matrix `[inputs, outputs]`.

    The factors of the inputs rise and those of the outputs fall, so that a map back has the mirrored train. No rank is
    larger than the matrix to its left or right can use.

    Args:
        inputs: any width.
        outputs: any width.
        rank: the largest r_k.

    Example:
        >>> train_shape(768, 64, 5).cores()
        [(1, 8, 5), (5, 8, 5), (5, 12, 5), (5, 8, 5), (5, 8, 1)]
        >>> train_shape(768, 8, 5).count(), train_shape(768, 64, 5).count()
        (580, 780)
    """
    left, right = equal_factors(inputs), equal_factors(outputs)[::-1]
    sizes = left + right
    bounds = (min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(len(sizes) + 1))
    return TrainShape(left, right, tuple(min(rank, bound) for bound in bounds))


@functools.lru_cache
def equal_factors(width: int) -> tuple[int, ...]:
    """Return a width as a product of rising factors, as many as bring them near 8, and as equal as can be.

    As equal as can be is the smallest sum. A width with too few prime factors is the product of these; a prime number
    stays whole.

    Example:
        >>> [equal_factors(width) for width in (576, 768, 2048, 97)]
        [(8, 8, 9), (8, 8, 12), (4, 8, 8, 8), (97,)]
    """
    wanted = max(1, round(math.log(width, _NEAR)))
    return next(
        min(found, key=sum) for count in range(wanted, 0, -1) if (found := list(_factorisations(width, count, 2)))
    )


def _factorisations(width: int, count: int, least: int) -> Iterator[tuple[int, ...]]:
    """Yield the ways to write a width as a product of `count` rising factors, none below `least`."""
    if count == 1:
        yield (width,)
        return
    for factor in range(least, math.floor(width ** (1 / count) + 1e-9) + 1):
        if width % factor == 0:
            yield from ((factor, *rest) for rest in _factorisations(width // factor, count - 1, factor))


def contract(cores: Sequence[Tensor]) -> Tensor:
    """Multiply cores `[r_{k-1}, n_k, r_k]` of a train out: `[r_0, n_1 … n_K, r_K]`, the last factor the fastest."""
    product = cores[0]
    for core in cores[1:]:
        product = torch.tensordot(product, core, dims=1).flatten(1, 2)
    return product


class TensorTrain(nn.Module):
    """A linear map `x [..., inputs] -> x W + bias` with `W[i_1 …, o_1 …] = G_1[i_1] … G_K[o_m]`.

    Oseledets 2011, doi:10.1137/090752286; trained in place of an adapter's matrices by Yang et al. 2024,
    arXiv:2402.11417. Parameters: `Σ r_{k-1} n_k r_k`, and a bias.

    Args:
        inputs: number of features, any.
        outputs: number of features, any.
        rank: the largest rank between two cores.
        bias: whether there is one; it is zero at the start.

    Raises:
        ValueError: the rank is not positive.

    Example:
        >>> train, x = TensorTrain(12, 6, rank=2), torch.randn(3, 12)
        >>> torch.allclose(train(x), x @ train.matrix().T, atol=1e-6)
        True
    """

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool = False) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"The rank of a tensor train must be at least 1, got {rank}.")
        self.shape = train_shape(inputs, outputs, rank)
        middle = self.shape.ranks[len(self.shape.inputs)]
        self._narrow = middle * (inputs + outputs) < inputs * outputs
        self.cores = nn.ParameterList(torch.empty(core) for core in self.shape.cores())
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw normal cores such that the matrix's entries have variance `1 / (inputs + outputs)`."""
        variance = 1 / (math.prod(self.shape.inputs) + math.prod(self.shape.outputs))
        for core in self.cores:
            nn.init.normal_(core, std=(variance ** (1 / len(self.cores)) / core.shape[2]) ** 0.5)

    def zero(self) -> None:
        """Make the map zero by its last core, which alone has a gradient then."""
        nn.init.zeros_(self.cores[-1])

    def halves(self) -> tuple[Tensor, Tensor]:
        """Return the cores of the inputs and those of the outputs multiplied out: `W = U V`.

        Returns:
            U `[inputs, r]` and V `[r, outputs]`, r the rank between the two.
        """
        cores, split = list(self.cores), len(self.shape.inputs)
        return contract(cores[:split])[0], contract(cores[split:])[..., 0]

    def matrix(self) -> Tensor:
        """Return the matrix `[outputs, inputs]`, as `nn.Linear.weight`."""
        u, v = self.halves()
        return (u @ v).T

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map to `x [..., inputs]`, through the rank in the middle where that is less work."""
        u, v = self.halves()
        y = x @ u @ v if self._narrow else x @ (u @ v)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"cores={self.shape.cores()}"
