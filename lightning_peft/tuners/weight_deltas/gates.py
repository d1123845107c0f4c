"""Reach the gates of an adapter's weight deltas: their noise, their expected number, and what they leave."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_peft.backbone.sharded import whole
from lightning_peft.tuners.weight_deltas.hard_concrete import NOISE, open_probability, settled
from lightning_peft.tuners.weight_deltas.layer import WeightDeltasLayer


@dataclass(frozen=True, eq=False)
class Gate:
    """The gates of one parameter's delta; their logits are `start + rate * entries`, and likewise the tensor's.

    Args:
        layer: the layer that holds them.
        adapter: the adapter.
        own: the parameter's name in its module.
        entries: what is trained of a gate for each entry, in the parameter's shape; 0 at first.
        tensor: the same of one gate for all of them, `[1]`; None without.
        rate: `[]`; where it is 0 the gates are open and stay so.
        start: the logit at the start.
    """

    layer: WeightDeltasLayer
    adapter: str
    own: str
    entries: nn.Parameter
    tensor: nn.Parameter | None
    rate: Tensor
    start: float

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained."""
        return [self.entries] if self.tensor is None else [self.entries, self.tensor]

    def draw(self, generator: torch.Generator) -> None:
        """Sample the gates from now on, with this noise, until `settle`."""
        shapes = [p.shape for p in self.parameters()]
        noise = [torch.rand(shape, generator=generator, device=generator.device) for shape in shapes]
        self.layer.noise.setdefault(self.adapter, {})[self.own] = [u.clamp_(NOISE, 1.0 - NOISE) for u in noise]

    def settle(self) -> None:
        """Compute with the gates of evaluation from now on."""
        self.layer.noise.pop(self.adapter, None)

    @torch.no_grad()
    def probabilities(self) -> list[Tensor]:
        """Return how probably the gates are not 0: those of entries, and that of the tensor where it has one."""
        return [open_probability(self.start + self.rate * whole(p)) for p in self.parameters()]

    @torch.no_grad()
    def values(self) -> Tensor:
        """Return what the delta is multiplied by in evaluation."""
        return product([settled(self.start + self.rate * whole(p)) for p in self.parameters()])

    def expected(self) -> Tensor:
        """Return the expected number of entries whose gates are not 0."""
        entries, *tensor = self.probabilities()
        return product([entries.sum(), *tensor]).sum()

    def penalty_gradients(self) -> list[Tensor]:
        """Return the gradients of `expected` with respect to `parameters`."""
        entries, *tensor = self.probabilities()
        if not tensor:
            return [self.rate * entries * (1 - entries)]
        whole_tensor = tensor[0]
        return [
            self.rate * whole_tensor * entries * (1 - entries),
            self.rate * whole_tensor * (1 - whole_tensor) * entries.sum(),
        ]


def product(factors: list[Tensor]) -> Tensor:
    """Return the product of one or two tensors."""
    return factors[0] if len(factors) == 1 else factors[0] * factors[1]


def gates(backbone: nn.Module, adapter: str) -> list[Gate]:
    """Return the gates of an adapter, in the order of `masks.deltas`."""
    every = []
    for layer in backbone.modules():
        if isinstance(layer, WeightDeltasLayer):
            by_tensor, rates = (layer._by_parameter(c, adapter) for c in (layer.tensor_gates, layer.gate_rates))
            for own, entries in layer._by_parameter(layer.gates, adapter).items():
                tensor = by_tensor[own] if own in by_tensor else None  # noqa: SIM401 - it has no `get`
                every.append(Gate(layer, adapter, own, entries, tensor, rates[own], layer.gate_starts[adapter]))
    return every
