"""Adapters whose change is a product of low rank, as plain LoRA: what servers load, and adapters can be added as."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.stack.adapter_files.bases import load_base
from lightning_peft.stack.adapter_files.folder import (
    AdapterError,
    adapter_folders,
    check_finite,
    read_folder,
    write_folders,
)
from lightning_peft.stack.configs import different_fields
from lightning_peft.stack.injection.initialisation import begins_in_weights, changes_base
from lightning_peft.stack.stack import stack_of

ROOT = "base_model.model."
FACTORS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
# fields of peft's configuration that leave the change at scaling * B A, or say how training began
_HARMLESS = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules"}
_HARMLESS |= {"layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out", "init_lora_weights"}
_HARMLESS |= {"task_type", "runtime_config", "eva_config", "corda_config", "loftq_config", "lora_ga_config"}
_ADAPTIVE = {"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}


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


def as_lora(folder: str | Path, output: str | Path, base: str | None = None) -> Path:
    """Write a saved adapter as a plain LoRA that computes the same.

    What comes out has one scaling for all matrices, `lora_alpha / r = 1`, in float32, and needs neither this package
    nor a repetition of how its training began: servers read no `rank_pattern`, no `alpha_pattern` and no
    `init_lora_weights`. Of unequal ranks the smaller are filled up with zeros, since some servers take a matrix's rank
    for r. A stack comes out as a stack.

    - LoRA: each matrix's scaling (rsLoRA's too) goes into its B.
    - LoRA that began with a part of the base's weights (PiSSA, OLoRA): `s (B A - B_0 A_0)`, of rank 2r, with the
      beginning `B_0 A_0` computed again from the base.
    - AdaLoRA: its singular values go into A; directions that were pruned are left out.
    - LoRTA, and every other type whose configuration has `lora_factors`.

    Args:
        folder: a folder that `load_adapter` reads.
        output: where to write; existing adapter files there are replaced.
        base: the base model, a folder or a name on the hub, which is read where the adapter began with a part of it;
            default: as the adapter says.

    Returns:
        The folder.

    Raises:
        AdapterError: an adapter is no product of low rank, or more than that (DoRA, biases, whole modules), or began
            with what cannot be computed again.
    """
    folder, written = Path(folder), {}
    folders = adapter_folders(folder)
    for path in folders:
        config, tensors, notes = read_folder(path)
        check_finite(tensors, str(path))
        exact = {key: value.float() for key, value in tensors.items()}
        if is_low_rank(config) and changes_base(config):
            factors = _with_beginning(config, exact, path, base)
        else:
            factors = read_factors(config, exact, str(path))
        if not factors:
            raise AdapterError(f"{path} holds no factors of a product.")
        written[path.name] = (*lora_written(config, filled(factors)), notes)
    write_folders(Path(output), written)
    return Path(output)


def read_factors(config: Any, tensors: Mapping[str, Tensor], source: str) -> dict[str, Factors]:
    """Return the factors of what a saved adapter adds, by the key of LoRA's A of each matrix, without its root.

    Raises:
        AdapterError: it does more than add products, or was made by changing the base.
    """
    if hasattr(config, "lora_factors"):
        try:
            pairs: dict[str, tuple[Tensor, Tensor]] = config.lora_factors(tensors)
        except AdapterError as error:
            raise AdapterError(f"{source}: {error}") from error
        return {key.removeprefix(ROOT) + ".lora_A.weight": Factors(a, b) for key, (a, b) in pairs.items()}
    from peft import AdaLoraConfig, LoraConfig

    if isinstance(config, AdaLoraConfig):
        return _adaptive_factors(config, tensors, source)
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{source} holds a {type(config).__name__}, whose change is no product of low rank.")
    return _plain_factors(config, tensors, source)


def is_low_rank(config: Any) -> bool:
    """Return whether `read_factors` knows a configuration's kind."""
    from peft import LoraConfig

    return hasattr(config, "lora_factors") or isinstance(config, LoraConfig)  # AdaLoRA's is one


def lora_written(config: Any, factors: Mapping[str, Factors]) -> tuple[Any, dict[str, Tensor]]:
    """Return configuration and tensors of the LoRA adapter that has these factors, at scaling 1."""
    from peft import LoraConfig

    config = copy.deepcopy(config) if type(config) is LoraConfig else _plain_config(config)
    ranks, tensors = {}, {}
    for key, value in factors.items():
        first = next(first for first in FACTORS if key.endswith(first))
        name = key.removesuffix(first)
        ranks[name] = value.A.shape[0]
        tensors[ROOT + key], tensors[ROOT + name + FACTORS[first]] = value.A, value.B
    config.r = config.lora_alpha = max(ranks.values())
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora, config.init_lora_weights = False, True
    config.target_modules, config.exclude_modules = sorted(ranks), None
    config.layers_to_transform = config.layers_pattern = None
    return config, tensors


def filled(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return factors of one rank, the largest given, where the smaller are filled up with zeros."""
    rank = max((value.A.shape[0] for value in factors.values()), default=0)

    def fill(value: Factors) -> Factors:
        missing = rank - value.A.shape[0]
        a = value.A.new_zeros(missing, *value.A.shape[1:])
        b = value.B.new_zeros(value.B.shape[0], missing, *value.B.shape[2:])
        return Factors(torch.cat([value.A, a]), torch.cat([value.B, b], dim=1))

    return {key: fill(value) for key, value in factors.items()}


def _plain_config(config: Any) -> Any:
    """Return a LoRA's configuration for the base and the task of another method's."""
    from peft import LoraConfig

    plain = LoraConfig(task_type=config.task_type)
    for name in ("base_model_name_or_path", "revision", "auto_mapping"):
        setattr(plain, name, getattr(config, name))
    return plain


def _plain_factors(config: Any, tensors: Mapping[str, Tensor], source: str) -> dict[str, Factors]:
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    _check_products(config, LoraConfig(), _HARMLESS, source)
    if changes_base(config):
        raise AdapterError(f"{source} was made by changing the base ({config.init_lora_weights}), so it has no sum.")
    factors: dict[str, Factors] = {}
    used: set[str] = set()
    for key, a in tensors.items():
        for first, second in FACTORS.items():
            if key.endswith(first) and (partner := key.removesuffix(first) + second) in tensors:
                name = key.removeprefix(ROOT).removesuffix(first)
                rank = a.shape[0]
                pattern = get_pattern_key(config.alpha_pattern.keys(), name)
                alpha = config.alpha_pattern.get(pattern, config.lora_alpha)
                scaling = alpha / (rank**0.5 if config.use_rslora else rank)
                factors[name + first], used = Factors(a, tensors[partner] * scaling), used | {key, partner}
    _check_used(tensors, used, source)
    return factors


def _adaptive_factors(config: Any, tensors: Mapping[str, Tensor], source: str) -> dict[str, Factors]:
    """Return the factors of an AdaLoRA, whose singular values E `[r, 1]` stand between B and A."""
    from peft import AdaLoraConfig

    _check_products(config, AdaLoraConfig(total_step=1), _HARMLESS | _ADAPTIVE, source)
    # as peft computes it, for pruned matrices too; the constant is peft's
    scaling = (config.lora_alpha if config.lora_alpha > 0 else config.init_r) / (config.init_r + 1e-5)
    factors: dict[str, Factors] = {}
    used: set[str] = set()
    for key, a in tensors.items():
        name = key.removesuffix(".lora_A")
        keys = {key, f"{name}.lora_B", f"{name}.lora_E"}
        if name != key and keys <= tensors.keys():
            e = tensors[f"{name}.lora_E"]
            kept = e.flatten().nonzero().flatten()
            kept = kept if len(kept) else torch.arange(min(1, len(e)))
            factors[name.removeprefix(ROOT) + ".lora_A.weight"] = Factors(
                (a * e)[kept], tensors[f"{name}.lora_B"][:, kept] * scaling
            )
            used |= keys
    _check_used(tensors, used, source)
    return factors


def _with_beginning(config: Any, tensors: Mapping[str, Tensor], folder: Path, base: str | None) -> dict[str, Factors]:
    """Return the factors of `s (B A - B_0 A_0)`, where `s B_0 A_0` was taken out of the base when training began.

    Raises:
        AdapterError: the beginning does not follow from the base's weights alone.
    """
    if not begins_in_weights(config):
        change = "layer_replication" if config.layer_replication else config.init_lora_weights
        raise AdapterError(
            f"{folder} changed the base in a way that its weights alone do not tell again ({change}): merge it."
        )
    model, _ = load_base(folder, base)
    stack = stack_of(model)
    part = stack.add(copy.deepcopy(config), "start")
    begun = {key: value.detach().float() for key, value in stack.tensors(part).items()}
    plain = copy.deepcopy(config)
    plain.init_lora_weights = True
    now, before = (read_factors(plain, state, str(folder)) for state in (tensors, begun))
    if now.keys() != before.keys():
        raise AdapterError(f"{folder} adapts other matrices than it would on {base or config.base_model_name_or_path}.")
    return {
        key: Factors(torch.cat([value.A, before[key].A]), torch.cat([value.B, -before[key].B], dim=1))
        for key, value in now.items()
    }


def _check_products(config: Any, default: Any, harmless: set[str], source: str) -> None:
    """Raise `AdapterError` where a LoRA, by its configuration, does more than add products."""
    others = {line.split(":")[0] for line in different_fields(config, default)}
    if strange := sorted(others - harmless):
        raise AdapterError(f"{source} does more than add a product to each matrix ({', '.join(strange)}): merge it.")


def _check_used(tensors: Mapping[str, Tensor], used: set[str], source: str) -> None:
    if left := sorted(tensors.keys() - used):
        raise AdapterError(f"{source} holds {left[0]}, which is no factor of a product: its sum is not known.")
