"""Sums of LoRA adapters: of their products, `scaling * B A`, not of their factors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.configs import different_fields
from lightning_peft.stack.injection.initialisation import changes_base

_MODEL = "base_model.model."
_FACTORS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
# fields of peft's configuration that leave the change at scaling * B A, or say how training began
_HARMLESS = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules"}
_HARMLESS |= {"layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out", "init_lora_weights"}
_HARMLESS |= {"task_type", "runtime_config", "eva_config", "corda_config", "loftq_config", "lora_ga_config"}


@dataclass(frozen=True)
class Factors:
    """The factors of the product `B A` that LoRA adds to one matrix, the scaling in B.

    Args:
        A: `[r, inputs]`; of a convolution `[r, inputs, *kernel]`.
        B: `[outputs, r]`; of a convolution `[outputs, r, 1, …]`.
    """

    A: Tensor
    B: Tensor

    def product(self) -> Tensor:
        """Return `B A`, `[outputs, inputs]`, a convolution's kernel flattened into its inputs."""
        return self.B.flatten(1).float() @ self.A.flatten(1).float()


def read_factors(config: Any, tensors: Mapping[str, Tensor], source: str) -> dict[str, Factors]:
    """Read the factors of a saved LoRA adapter, by the key of its matrix.

    Raises:
        AdapterError: it does more than add products, or was made by changing the base.
    """
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    others = [line.split(":")[0] for line in different_fields(config, LoraConfig())]
    if strange := sorted(set(others) - _HARMLESS):
        raise AdapterError(f"{source} does more than add a product to each matrix ({', '.join(strange)}): merge it.")
    if changes_base(config):
        raise AdapterError(f"{source} was made by changing the base ({config.init_lora_weights}), so it has no sum.")
    factors: dict[str, Factors] = {}
    used: set[str] = set()
    for key, a in tensors.items():
        for first, second in _FACTORS.items():
            if key.endswith(first) and (partner := key.removesuffix(first) + second) in tensors:
                name = key.removeprefix(_MODEL).removesuffix(first)
                rank = a.shape[0]
                pattern = get_pattern_key(config.alpha_pattern.keys(), name)
                alpha = config.alpha_pattern.get(pattern, config.lora_alpha)
                scaling = alpha / (rank**0.5 if config.use_rslora else rank)
                factors[name + first], used = Factors(a, tensors[partner] * scaling), used | {key, partner}
    if left := sorted(tensors.keys() - used):
        raise AdapterError(f"{source} holds {left[0]}, which is no factor of a product: its sum is not known.")
    return factors


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


def lora_written(config: Any, factors: Mapping[str, Factors]) -> tuple[Any, dict[str, Tensor]]:
    """Return configuration and tensors of the LoRA adapter that has these factors, at scaling 1."""
    config = copy.deepcopy(config)
    ranks, tensors = {}, {}
    for key, value in factors.items():
        first = next(first for first in _FACTORS if key.endswith(first))
        name = key.removesuffix(first)
        ranks[name] = value.A.shape[0]
        tensors[_MODEL + key], tensors[_MODEL + name + _FACTORS[first]] = value.A, value.B
    config.r = config.lora_alpha = max(ranks.values())
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora, config.init_lora_weights = False, True
    config.target_modules, config.exclude_modules = sorted(ranks), None
    config.layers_to_transform = config.layers_pattern = None
    return config, tensors
