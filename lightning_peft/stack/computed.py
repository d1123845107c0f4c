"""An adapter whose weights are computed, which is the result of every edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class ComputedAdapter:
    """A peft adapter whose weights are computed; `AdapterStack.put` puts it on a backbone.

    Args:
        config: its configuration.
        tensors: its weights, under the keys of a saved peft folder; see `saved_key`.
        record: JSON-able: how it was computed.
    """

    config: PeftConfig
    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any] = field(default_factory=dict)


def saved_key(module: str, tensor: str) -> str:
    """Return the key in a saved peft folder of an adapter's tensor on a module.

    Args:
        module: the module's name in the backbone without adapters.
        tensor: the adapter's name for the tensor on that module.

    Example:
        >>> saved_key("model.layers.1.self_attn.o_proj", "head_offsets")
        'base_model.model.model.layers.1.self_attn.o_proj.head_offsets'
    """
    return f"base_model.model.{module}.{tensor}"
