"""Directions are unit vectors; sigma is the plain standard deviation along them."""

from __future__ import annotations

import numpy as np
import torch

from lightning_peft.editing.directions import mass_mean, projection_std, random_directions, unit


def test_mass_mean_by_hand() -> None:
    x = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]], [[0.0, 1.0]], [[-4.0, -9.0]], [[-2.0, 2.0]]])
    y = torch.tensor([1, 1, 0, 0, 0])
    # true mean (2, 0), false mean (-2, -2): the difference is (4, 2)
    torch.testing.assert_close(mass_mean(x, y), torch.tensor([[4.0, 2.0]]) / 20**0.5)


def test_directions_have_length_one() -> None:
    x = torch.randn(40, 6, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 6)[:, None]
    y = torch.arange(40) % 2
    for directions in (mass_mean(x, y), random_directions(6, 5, seed=1), unit(x[0])):
        torch.testing.assert_close(directions.norm(dim=-1), torch.ones(6))


def test_a_zero_vector_has_no_direction_and_stays_zero() -> None:
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_sigma_is_numpys_standard_deviation() -> None:
    x = torch.randn(30, 4, 5, generator=torch.Generator().manual_seed(2)) + 3
    directions = random_directions(4, 5, seed=3)
    for group in range(4):
        expected = np.std(x[:, group].numpy() @ directions[group].numpy())  # ddof 0
        np.testing.assert_allclose(projection_std(x, directions)[group], expected, rtol=1e-5)


def test_random_directions_follow_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = random_directions(3, 4, seed=7)
    torch.manual_seed(6)
    assert torch.equal(first, random_directions(3, 4, seed=7))
    assert not torch.equal(first, random_directions(3, 4, seed=8))
