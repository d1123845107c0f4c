"""Directions are unit vectors; sigma is the plain standard deviation along them."""

from __future__ import annotations

import numpy as np
import torch

from lightning_peft.editing import LogisticProbes
from lightning_peft.editing.directions import (
    mass_mean,
    principal,
    probe_weight,
    projection_std,
    random_directions,
    unit,
)


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


def test_principal_direction_is_numpys_first_singular_vector_towards_the_true_examples() -> None:
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(60, 3, 4, generator=generator), torch.arange(60) % 2
    x[..., 2] *= 5
    x[y == 1, :, 2] -= 1
    found = principal(x, y)
    for group in range(3):
        z = (x[:, group] - x[:, group].mean(0)).numpy()
        first = np.linalg.svd(z, full_matrices=False)[2][0]
        assert abs(float(found[group].numpy() @ first)) > 1 - 1e-5
    assert bool(((found * mass_mean(x, y)).sum(-1) >= 0).all())


def test_reading_vectors_find_what_differs_within_pairs_whatever_else_varies_more() -> None:
    generator = torch.Generator().manual_seed(5)
    topic, truth = torch.randn(50, 1, 3, generator=generator) * 10, torch.arange(100) % 2
    x = topic.repeat_interleave(2, 0) + 0.1 * torch.randn(100, 1, 3, generator=generator)
    x[truth == 1, 0, 1] += 1
    pairs = torch.arange(100).reshape(50, 2)
    assert float(principal(x, truth, pairs)[0, 1]) > 0.99
    assert float(principal(x, truth)[0, 1].abs()) < 0.99
    torch.testing.assert_close(principal(x, truth, pairs.flip(1)), principal(x, truth, pairs))


def test_a_probes_weight_is_the_normal_of_its_plane() -> None:
    x = torch.randn(80, 2, 3, generator=torch.Generator().manual_seed(7))
    y = torch.arange(80) % 2
    x[y == 1, 0, 1] += 2
    probes = LogisticProbes().fit(x, y)
    found = probe_weight(probes)
    along = x.double() + 3.0 * (torch.eye(3)[0].double() - found * found[:, :1])  # a move within each plane
    torch.testing.assert_close(probes.decision_function(along), probes.decision_function(x))
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2).double())
