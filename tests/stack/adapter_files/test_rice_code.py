"""Sparse signs as bits: nothing is lost, and little more than the entropy is used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_peft.stack.adapter_files.rice_code import entropy_bound, pack_signs, unpack_signs


def signs(size: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(size, generator=generator) < density
    return kept.to(torch.int8) * (2 * torch.randint(0, 2, (size,), generator=generator) - 1).to(torch.int8)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([-1, 0, 0, 0, 1]), max_size=200))
def test_any_signs_come_back(values: list[int]) -> None:
    vector = torch.tensor(values, dtype=torch.int8)
    assert torch.equal(unpack_signs(pack_signs(vector)), vector)


@pytest.mark.parametrize("density", [0.0, 1e-4, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9, 1.0])
def test_many_signs_come_back_at_any_density(density: float) -> None:
    vector = signs(100_003, density)
    assert torch.equal(unpack_signs(pack_signs(vector)), vector)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_random_signs_take_at_most_three_percent_more_than_their_entropy(density: float) -> None:
    vector = signs(200_000, density)
    size = sum(tensor.nbytes for tensor in pack_signs(vector).values())
    bound = entropy_bound(int(vector.count_nonzero()) / len(vector)) * len(vector) / 8
    assert 1.0 <= size / bound < 1.03


def test_the_bound_is_the_entropy_of_three_symbols() -> None:
    for density in (0.05, 0.3, 2 / 3):
        p = np.array([1 - density, density / 2, density / 2])
        assert entropy_bound(density) == pytest.approx(-(p * np.log2(p)).sum())
    assert entropy_bound(0.0) == 0.0 and entropy_bound(1.0) == 1.0


@pytest.mark.parametrize(
    ("stream", "value"),
    [
        ("negative", torch.zeros(3, dtype=torch.uint8)),
        ("remainders", torch.zeros(0, dtype=torch.uint8)),
        ("quotients", torch.full((4,), 255, dtype=torch.uint8)),
        ("layout", torch.tensor([10, 2000, 2])),
        ("layout", torch.tensor([10, 990, 63])),
    ],
)
def test_streams_that_do_not_fit_are_refused(stream: str, value: torch.Tensor) -> None:
    packed = pack_signs(signs(10_000, 0.1))
    with pytest.raises(ValueError):
        unpack_signs(packed | {stream: value})


def test_places_beyond_the_end_are_refused() -> None:
    packed = pack_signs(signs(10_000, 0.1))
    packed["layout"][0] = 5_000
    with pytest.raises(ValueError, match="beyond its 5000 entries"):
        unpack_signs(packed)
