"""Sums of adapters of low rank, LoRA and what is as good: of their products, `scaling * B A`, not of their factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_peft.stack.adapter_files.as_lora import Factors, lora_written, read_factors
from lightning_peft.stack.adapter_files.folder import AdapterError

__all__ = ["Factors", "concatenated", "factorised", "lora_written", "read_factors"]


def concatenated(adapters: Sequence[Mapping[str, Factors]], weights: Sequence[float]) -> dict[str, Factors]:
    """Return the exact weighted sum of the products, whose ranks add up: peft's `combination_type="cat"`."""
    keys = dict.fromkeys(key for adapter in adapters for key in adapter)
    joined = {}
    for key in keys:
        having = [(adapter[key], weight) for adapter, weight in zip(adapters, weights, strict=True) if key in adapter]
        if len({(f.A.shape[1:], f.B.shape[0]) for f, _ in having}) > 1:
            raise AdapterError(f"{key} has different shapes in these adapters: they are of different models.")
        joined[key] = Factors(torch.cat([f.A for f, _ in having]), torch.cat([w * f.B for f, w in having], dim=1))
    return joined


def factorised(product: Tensor, like: Factors, rank: int) -> tuple[Factors, float, float]:
    """Compute the best factors of a rank for a product `[outputs, inputs]`, by singular values.

    Returns:
        The factors, in the shape of those given, the squared norm of the product, and how much of it they have.
    """
    u, s, v = torch.linalg.svd(product, full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    a, b = root[:, None] * v[:rank], u[:, :rank] * root
    shaped = Factors(a.reshape(rank, *like.A.shape[1:]), b.reshape(len(b), rank, *[1] * (like.B.dim() - 2)))
    return shaped, float((s**2).sum()), float((s[:rank] ** 2).sum())
