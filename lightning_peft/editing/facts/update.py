"""The update in closed form, as factors of a LoRA adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.modules import base_modules
from lightning_peft.editing.facts.values import hooked
from lightning_peft.stack.adapter import Adapter
from lightning_peft.stack.computed import ComputedAdapter, saved_key
from lightning_peft.stack.stack import AdapterStack, stack_of

if TYPE_CHECKING:
    from peft import LoraConfig

Factors = tuple[Tensor, Tensor]  # A [r, inputs], B [outputs, r]: the matrix changes by B A


def rank_one(delta: Tensor, key: Tensor, moment: Tensor) -> Factors:
    """Return `ΔW = δ (C⁻¹k)ᵀ / (kᵀC⁻¹k)`, the least change, measured by C, with which `(W + ΔW) k = W k + δ`.

    Meng et al. 2022, arXiv:2202.05262, eq. 2.

    Args:
        delta: `[outputs]`, v* − W k*.
        key: `[inputs]`, k*.
        moment: `[inputs, inputs]`, C, positive definite.

    Returns:
        A `[1, inputs]` and B `[outputs, 1]`, float32.

    Example:
        >>> a, b = rank_one(torch.tensor([3.0]), torch.tensor([1.0, 2.0]), torch.eye(2))
        >>> b @ a @ torch.tensor([1.0, 2.0])
        tensor([3.])
    """
    k = key.double()
    solved = torch.linalg.solve(moment.double(), k)
    return (solved / (k @ solved))[None].float(), delta[:, None].float()


def least_squares(residuals: Tensor, keys: Tensor, moment: Tensor, weight: float) -> Factors:
    """Return `Δ = R Kᵀ (λC + K Kᵀ)⁻¹`: many memories at once, against λ times what the matrix already holds.

    Meng et al. 2023, arXiv:2210.07229, eq. 14. Its rank is at most the number of facts n, and these are its factors.

    Args:
        residuals: `[n, outputs]`, R transposed.
        keys: `[n, inputs]`, K transposed.
        moment: `[inputs, inputs]`, C, positive definite.
        weight: λ.

    Returns:
        A `[n, inputs]` and B `[outputs, n]`, float32.
    """
    k = keys.double()
    return torch.linalg.solve(weight * moment.double() + k.T @ k, k.T).T.contiguous().float(), residuals.T.float()


@dataclass(frozen=True)
class KnowledgeEdit:
    """A computed change of some matrices, each of the same rank.

    Args:
        factors: the matrix's name -> A `[r, inputs]` and B `[outputs, r]`.
        record: JSON-able: how it was computed.
    """

    factors: dict[str, Factors]
    record: dict[str, Any]

    def dense(self, name: str) -> Tensor:
        """Return `ΔW [outputs, inputs]` of one matrix."""
        a, b = self.factors[name]
        return b @ a

    def config(self, backbone: nn.Module) -> LoraConfig:
        """Return the LoRA configuration that holds it at strength 1."""
        return lora_config(backbone, list(self.factors), len(next(iter(self.factors.values()))[0]))

    def adapter(self, backbone: nn.Module) -> ComputedAdapter:
        """Return the LoRA adapter that holds it, for the model it was computed for."""
        tensors: dict[str, Tensor] = {}
        for module, (a, b) in self.factors.items():
            tensors |= {saved_key(module, "lora_A.weight"): a, saved_key(module, "lora_B.weight"): b}
        return ComputedAdapter(self.config(backbone), tensors, self.record)

    def install(self, backbone: nn.Module | AdapterStack, name: str = "rome") -> Adapter:
        """Put it on a backbone as an adapter, outermost, in place of what was there under that name.

        Args:
            backbone: the model it was computed for, or its stack of adapters.
            name: the adapter's name.

        Returns:
            The part of the stack, to be scaled, switched off, saved or removed.
        """
        stack = backbone if isinstance(backbone, AdapterStack) else stack_of(backbone)
        return stack.put(name, self.adapter(stack.backbone))


def lora_config(backbone: nn.Module, modules: list[str], r: int) -> LoraConfig:
    """Make the configuration of a LoRA of rank r on these matrices, with scaling 1."""
    from peft import LoraConfig

    named = dict(base_modules(backbone))
    transposed = any(type(named[module]).__name__ == "Conv1D" for module in modules)
    return LoraConfig(r=r, lora_alpha=r, lora_dropout=0.0, target_modules=modules, fan_in_fan_out=transposed)


@contextmanager
def acting(model: nn.Module, factors: Mapping[str, Factors]) -> Iterator[None]:
    """Let changes act that are not yet on the model: each matrix's output gets `B A x` added."""

    def adder(a: Tensor, b: Tensor) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0].to(a.dtype)
            return output + (x @ a.to(x.device).T @ b.to(x.device).T).to(output.dtype)

        return add

    with hooked(model, {name: adder(a, b) for name, (a, b) in factors.items()}):
        yield


def stacked(factors: list[Factors]) -> Factors:
    """Stack changes of one matrix into one, whose rank is the sum of theirs."""
    return torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], dim=1)
