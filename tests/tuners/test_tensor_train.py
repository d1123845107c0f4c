"""Tensor trains: what their cores make, how widths are cut, and that a rank large enough holds any matrix."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from tuning import one_sentence

from lightning_peft.tuners.tensor_train import TensorTrain, contract, equal_factors, train_shape

WIDTHS = ((12, 6), (97, 8), (8, 97), (60, 64), (1, 5), (7, 1))


def by_loops(cores: list[np.ndarray], inputs: int, outputs: int) -> np.ndarray:
    """The matrix `[inputs, outputs]` of a train, one entry after another: a product of one slice of each core."""
    sizes = [core.shape[1] for core in cores]
    entries = []
    for index in itertools.product(*map(range, sizes)):  # the last factor is the fastest
        row = np.ones((1, 1))
        for core, i in zip(cores, index, strict=True):
            row = row @ core[:, i, :]
        entries.append(row.item())
    return np.array(entries).reshape(inputs, outputs)


def tt_svd(matrix: np.ndarray, sizes: tuple[int, ...], rank: int) -> list[np.ndarray]:
    """Oseledets' decomposition of a matrix's entries into a train, by one singular value decomposition a core."""
    cores, left, rest = [], 1, matrix.reshape(-1)
    for size in sizes[:-1]:
        u, s, v = np.linalg.svd(rest.reshape(left * size, -1), full_matrices=False)
        kept = min(rank, len(s))
        cores.append(u[:, :kept].reshape(left, size, kept))
        left, rest = kept, s[:kept, None] * v[:kept]
    return [*cores, rest.reshape(left, sizes[-1], 1)]


def cores_of(train: TensorTrain) -> list[np.ndarray]:
    return [core.detach().double().numpy() for core in train.cores]


def test_a_train_of_four_cores_makes_what_loops_over_its_slices_make() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 3), (3, 4, 2), (2, 3, 5), (5, 2, 1))
    cores = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    made = contract(cores).reshape(8, 6).numpy()
    np.testing.assert_allclose(made, by_loops([core.numpy() for core in cores], 8, 6), atol=1e-12)


@pytest.mark.parametrize(("inputs", "outputs"), WIDTHS)
@pytest.mark.parametrize("rank", [1, 3, 50])
def test_the_map_multiplies_by_that_matrix_whichever_way_is_less_work(inputs: int, outputs: int, rank: int) -> None:
    torch.manual_seed(1)
    train, x = TensorTrain(inputs, outputs, rank, bias=True), torch.randn(2, 3, inputs)
    assert train.bias is not None
    train.bias.data.normal_()
    matrix = torch.from_numpy(by_loops(cores_of(train), inputs, outputs)).float()
    torch.testing.assert_close(train(x), x @ matrix + train.bias, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(train.matrix(), matrix.T, atol=1e-6, rtol=1e-5)


def test_the_dense_matrix_is_made_only_where_the_rank_in_the_middle_saves_nothing() -> None:
    seen: list[tuple[Any, ...]] = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
                seen.append(tuple(tuple(arg.shape) for arg in args))
            return super().__torch_function__(func, types, args, kwargs or {})

    TensorTrain(768, 64, 5)(torch.randn(2, 768).as_subclass(Watched))
    assert seen == [((2, 768), (768, 5)), ((2, 5), (5, 64))]
    seen.clear()
    TensorTrain(6, 4, 50)(torch.randn(2, 6).as_subclass(Watched))
    assert seen == [((2, 6), (6, 4))]


# -- shapes and counts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "outputs", "sizes", "count"),
    [
        (768, 8, (8, 8, 12, 8), 580),  # the two that the paper's package has for BERT
        (768, 64, (8, 8, 12, 8, 8), 780),
        (8, 768, (8, 12, 8, 8), 580),
        (64, 768, (8, 8, 12, 8, 8), 780),
        (576, 8, (8, 8, 9, 8), 505),
        (97, 8, (97, 8), 525),
    ],
)
def test_a_train_has_the_factors_and_the_count_of_the_paper(
    inputs: int, outputs: int, sizes: tuple[int, ...], count: int
) -> None:
    shape, train = train_shape(inputs, outputs, 5), TensorTrain(inputs, outputs, 5)
    assert shape.inputs + shape.outputs == sizes
    assert count == 5 * sizes[0] + sum(5 * n * 5 for n in sizes[1:-1]) + 5 * sizes[-1]
    assert shape.count() == sum(p.numel() for p in train.parameters()) == count


def test_factors_are_as_equal_as_can_be_for_every_width() -> None:
    for width in range(1, 700):
        factors = equal_factors(width)
        assert math.prod(factors) == width and list(factors) == sorted(factors)
        divisors = [d for d in range(2, width + 1) if width % d == 0]
        others = [c for c in itertools.combinations_with_replacement(divisors, len(factors)) if math.prod(c) == width]
        assert all(sum(factors) <= sum(other) for other in others)
        if len(divisors) <= 1:
            assert factors == (width,)
    assert equal_factors(50257) == (29, 1733) and equal_factors(2**17) == (4, 8, 8, 8, 8, 8)


def test_no_rank_is_larger_than_the_matrix_beside_it_can_use() -> None:
    assert train_shape(32, 64, 100).ranks == (1, 4, 32, 8, 1)
    assert train_shape(2048, 8, 5).ranks == (1, 4, 5, 5, 5, 1)
    assert train_shape(768, 64, 5).ranks == (1, 5, 5, 5, 5, 1)
    assert train_shape(768, 4, 5).ranks == (1, 5, 5, 4, 1)


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be at least 1, got 0\.$") as error:
        TensorTrain(4, 4, 0)
    assert one_sentence(str(error.value))


# -- what it can hold -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inputs", "outputs"), WIDTHS)
def test_with_a_large_rank_it_holds_any_matrix(inputs: int, outputs: int) -> None:
    matrix = np.random.default_rng(3).standard_normal((inputs, outputs))
    train = TensorTrain(inputs, outputs, rank=10_000).double()
    decomposed = tt_svd(matrix, train.shape.inputs + train.shape.outputs, 10_000)
    for core, values in zip(train.cores, decomposed, strict=True):
        assert core.shape == values.shape
        core.data.copy_(torch.from_numpy(values))
    assert abs(train.matrix().T.detach().numpy() - matrix).max() < 1e-6


def test_a_decomposition_at_its_own_rank_loses_nothing_and_at_a_smaller_one_does() -> None:
    torch.manual_seed(2)
    train = TensorTrain(36, 16, 3)
    matrix, sizes = by_loops(cores_of(train), 36, 16), train.shape.inputs + train.shape.outputs
    errors = [abs(by_loops(tt_svd(matrix, sizes, r), 36, 16) - matrix).max() / abs(matrix).max() for r in (3, 2)]
    assert errors[0] < 1e-10 and errors[1] > 1e-2


# -- the start ------------------------------------------------------------------------------------------------------


def test_entries_begin_with_the_variance_one_over_the_sum_of_the_widths() -> None:
    torch.manual_seed(0)
    squares = [TensorTrain(96, 32, 5).matrix().square().mean() * (96 + 32) for _ in range(300)]
    assert 0.85 < float(torch.stack(squares).mean()) < 1.15


def test_made_zero_it_gives_nothing_and_learns_by_its_last_core() -> None:
    train = TensorTrain(12, 6, 3, bias=True)
    train.zero()
    y = train(torch.randn(4, 12))
    assert not y.any()
    (y - 1).square().sum().backward()
    moved = [bool(core.grad is not None and core.grad.any()) for core in train.cores]
    assert moved == [False] * (len(moved) - 1) + [True]
