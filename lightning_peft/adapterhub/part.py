"""One adapter as it is here, translated from AdapterHub's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from peft import PeftConfig

# before each key of a saved peft folder
ROOT = "base_model.model."


@dataclass(frozen=True)
class Part:
    """An adapter, of which a union gives several.

    Args:
        name: what it is.
        config: its peft configuration.
        tensors: its tensors, by the keys of a saved peft folder.
    """

    name: str
    config: PeftConfig
    tensors: dict[str, Tensor]
