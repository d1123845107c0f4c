"""Gates of deltas: their chance of being open, what they are in evaluation, and the gradients of what is expected."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.stack.stack import stack_of
from lightning_peft.tuners.weight_deltas import WeightDeltasConfig
from lightning_peft.tuners.weight_deltas.gates import Gate, gates
from lightning_peft.tuners.weight_deltas.hard_concrete import open_probability, sampled, settled


@pytest.mark.parametrize(("lower", "upper", "beta"), [(-1.5, 1.5, 1.0), (-0.1, 1.1, 2 / 3)])
@pytest.mark.parametrize("alpha", [-1.0, 0.3, 2.0])
def test_a_gate_is_open_as_often_as_the_formula_says(lower: float, upper: float, beta: float, alpha: float) -> None:
    noise = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = float((sampled(torch.tensor(alpha), noise, lower, upper, beta) > 0).double().mean())
    expected = 1 / (1 + math.exp(-(alpha - beta * math.log(-lower / upper))))
    assert float(open_probability(torch.tensor(alpha), lower, upper, beta)) == pytest.approx(expected, abs=1e-6)
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 1e5))


def test_in_evaluation_a_gate_is_the_stretched_sigmoid() -> None:
    logits = torch.tensor([-5.0, -0.2, 0.0, 0.4, 1.0, 5.0], dtype=torch.float64)
    expected = [min(1.0, max(0.0, 3 / (1 + math.exp(-a)) - 1.5)) for a in logits.tolist()]
    assert torch.allclose(settled(logits), torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def gated(structured: bool = True) -> tuple[Any, Gate]:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4)
    names = ["weight"]
    stack_of(layer).add(
        WeightDeltasConfig(target_parameters=names, masked=names, gates=5.0, tensor_gates=structured), "a"
    )
    (gate,) = gates(layer, "a")
    gate.rate.fill_(0.5)
    for parameter in gate.parameters():
        nn.init.normal_(parameter, -8.0, 4.0)
    return layer, gate


@pytest.mark.parametrize("structured", [False, True])
def test_the_expected_number_of_entries_is_what_draws_leave(structured: bool) -> None:
    layer, gate = gated(structured)
    if gate.tensor is not None:
        gate.tensor.data.fill_(-9.0)  # a logit of 0.5
    layer.weight_deltas.values["a"]["weight"].data.fill_(1.0)
    generator = torch.Generator().manual_seed(0)
    base, numbers = layer.weight_deltas._owner[0]._parameters["weight"], []
    with torch.no_grad():
        for _ in range(1000):
            gate.draw(generator)
            numbers.append(float((layer.weight != base).sum()))
    drawn = torch.tensor(numbers)
    assert float(drawn.mean()) == pytest.approx(float(gate.expected()), abs=4 * float(drawn.std()) / math.sqrt(1000))


@pytest.mark.parametrize("structured", [False, True])
def test_the_penalty_s_gradients_are_autograd_s_of_the_product_of_probabilities(structured: bool) -> None:
    _, gate = gated(structured)
    logits = [5.0 + 0.5 * parameter for parameter in gate.parameters()]
    total = torch.sigmoid(logits[0]).sum()
    if structured:
        total = (torch.sigmoid(logits[0]) * torch.sigmoid(logits[1])).sum()
    for mine, theirs in zip(gate.penalty_gradients(), torch.autograd.grad(total, gate.parameters()), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6) and theirs.any()


def test_gradients_through_sampled_gates_are_those_of_the_written_out_formula() -> None:
    layer, gate = gated()
    value: Tensor = layer.weight_deltas.values["a"]["weight"]
    assert gate.tensor is not None
    gate.entries.data.div_(4)
    gate.tensor.data.fill_(-9.0)
    nn.init.normal_(value)
    gate.draw(torch.Generator().manual_seed(3))
    u, u_tensor = gate.layer.noise["a"]["weight"]
    x, cotangent = torch.randn(3, 5), torch.randn(3, 4)
    (layer(x) * cotangent).sum().backward()
    dw = cotangent.T @ x  # the gradient of the weight

    def stretched(u: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """The gate, and its derivative with respect to the parameter."""
        s = 1 / (1 + torch.exp(-(torch.log(u / (1 - u)) + 5.0 + 0.5 * parameter)))
        t = 3 * s - 1.5
        return t.clamp(0, 1), torch.where((t > 0) & (t < 1), 3 * s * (1 - s) * 0.5, 0.0)

    z, dz = stretched(u, gate.entries.detach())
    z_tensor, dz_tensor = stretched(u_tensor, gate.tensor.detach())
    assert int((dz != 0).sum()) > 0 and z_tensor > 0
    assert value.grad is not None and torch.allclose(value.grad, dw * z * z_tensor, atol=1e-5)
    assert gate.entries.grad is not None
    assert torch.allclose(gate.entries.grad, dw * value.detach() * dz * z_tensor, atol=1e-5)
    assert gate.tensor.grad is not None
    assert torch.allclose(gate.tensor.grad, (dw * value.detach() * z).sum() * dz_tensor, atol=1e-5)


def test_gates_that_could_be_closed_at_the_start_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gates must be at least log\(5\)"):
        WeightDeltasConfig(target_parameters=["weight"], gates=1.5)
