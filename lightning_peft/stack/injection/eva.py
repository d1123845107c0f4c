"""EVA: LoRA's A from the directions in which a layer's inputs vary most (Paischer et al. 2024, arXiv:2410.07170)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Inputs:
    """Second moments of the inputs of LoRA's layers, `sum x x'` over tokens, one matrix for layers of equal input.

    Args:
        layers: peft's LoRA layers with a linear base; each moment is `[inputs, inputs]` in float32.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.moments: dict[nn.Module, Tensor] = {}
        self._keep: Tensor | None = None
        self._seen: list[tuple[Tensor, Tensor]] = []  # in this batch: an input, and the moment it went into

    @contextmanager
    def observed(self, keep: Tensor | None = None) -> Iterator[None]:
        """Watch one forward pass.

        Args:
            keep: `[B, T]`, which tokens count; layers given something of another shape count all.
        """
        self._keep, self._seen = keep, []
        handles = [layer.register_forward_pre_hook(self._observe) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen = []

    def sum_over(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Add up the moments of several processes, by a function that does so for one tensor."""
        for moment in {id(m): m for m in self.moments.values()}.values():
            moment.copy_(reduce(moment))

    @torch.no_grad()
    def set(self, name: str) -> None:
        """Make A of each layer the strongest directions, orthonormal and strongest first; B stays zero.

        Raises:
            ValueError: a layer was never called.
        """
        if unseen := [layer for layer in self.layers if layer not in self.moments]:
            raise ValueError(
                f"EVA looks at the inputs of adapted layers, and {len(unseen)} of {len(self.layers)} were never called "
                "in training batches."
            )
        directions: dict[int, Tensor] = {}
        for layer in self.layers:
            moment = self.moments[layer]
            if id(moment) not in directions:
                directions[id(moment)] = torch.linalg.eigh(moment.double())[1].flip(1).T
            weight = layer.lora_A[name].weight
            rank = min(weight.shape)
            weight[:rank].copy_(directions[id(moment)][:rank])

    def _observe(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        known = self.moments.get(layer)
        for earlier, moment in self._seen:
            if earlier is args[0] and known in (None, moment):
                self.moments[layer] = moment
                return
        if known is None:
            known = self.moments[layer] = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
        rows = x[self._keep] if self._keep is not None and x.shape[:2] == self._keep.shape else x.flatten(0, -2)
        rows = rows.float()
        known.addmm_(rows.T, rows)
        self._seen.append((args[0], known))
