"""The plain model that merged weights are saved as: its class, and a configuration under which each has a place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.backbone.modules import state_tensors

Alike = Callable[[str, str], bool]
_TIED = "tie_word_embeddings"


@dataclass(eq=False)
class PlainModel:
    """A model without adapters and without values.

    Args:
        skeleton: the model, on the meta device.
        untied: weights that the base shares and this model has for themselves.
    """

    skeleton: Any
    untied: tuple[str, ...]

    def __post_init__(self) -> None:
        self.cls = type(self.skeleton)
        self.names = set(state_tensors(self.skeleton))
        self.dtype, self.dtypes = torch.float32, dict[str, torch.dtype]()

    def save(self, weights: Mapping[str, Tensor], source: Any, dtype: torch.dtype, folder: Path) -> None:
        """Write these weights as this model, with the generation settings of `source`, and release the skeleton."""
        model, seen = self.skeleton, set()
        unshared = {}
        for name, value in weights.items():
            memory = value.untyped_storage().data_ptr()
            unshared[name] = value.detach().clone() if memory in seen else value.detach()
            seen.add(memory)
        model.load_state_dict(unshared, assign=True)
        model.tie_weights()
        self.dtypes = {name: value.dtype for name, value in state_tensors(model).items()}
        self.dtype = model.config.dtype = dtype
        model.generation_config = source.generation_config if model.can_generate() else None
        model.save_pretrained(folder)
        self.skeleton = None


def plain_model(adapted: Any, alike: Alike) -> PlainModel:
    """Return a model of the same class and configuration as an adapted one, in which every merged weight has a place.

    Where merging made two weights of a shared one, they get a place each by `tie_word_embeddings=False`.

    Args:
        adapted: a transformers model with adapters.
        alike: whether two weights, by their names, are the same after merging.

    Raises:
        ValueError: the model shares weights whatever its configuration says, or has none for what it consists of.
    """
    config = copy.deepcopy(adapted.config)
    skeleton = _build(adapted, config)
    if not (pairs := _unequal_pairs(skeleton, alike)):
        return PlainModel(skeleton, ())
    for holder in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if getattr(holder, _TIED, False):
            setattr(holder, _TIED, False)
    skeleton = _build(adapted, config)
    if still := _unequal_pairs(skeleton, alike):
        raise ValueError(
            f"A {type(adapted).__name__} shares {still[0][1]} with {still[0][0]}, and only one of the two was trained: "
            "keep the adapter beside its base."
        )
    return PlainModel(skeleton, tuple(sorted({name for pair in pairs for name in pair})))


def _build(adapted: Any, config: Any) -> Any:
    try:
        return type(adapted)._from_config(config, dtype=adapted.dtype)
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"No plain {type(adapted).__name__} is what the adapter makes of its base: {error}") from error


def _unequal_pairs(skeleton: Any, alike: Alike) -> list[tuple[str, str]]:
    """Return pairs of names that the model shares, of weights that are not the same."""
    first: dict[int, str] = {}
    pairs = []
    for name, value in skeleton.state_dict(keep_vars=True).items():
        first_name = first.setdefault(id(value), name)
        if first_name != name and not alike(first_name, name):
            pairs.append((first_name, name))
    return pairs
