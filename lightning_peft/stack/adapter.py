"""One adapter of a stack: its configuration, its state and its place on the backbone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_peft.stack.injection.injection import Injection

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(eq=False)
class Adapter:
    """One adapter of a stack.

    Args:
        name: peft's adapter name.
        config: the configuration it was made from, as given (peft fills in and changes its own copy).
        injection: how it sits on the backbone.
        computed: its weights are computed (an edit), not trained.
        record: JSON-able notes on how an edit was computed.
        scale: the dial: 1 as trained or computed, 0 off, negative reversed.
        enabled: whether it acts at all.
    """

    name: str
    config: PeftConfig
    injection: Injection
    computed: bool = False
    record: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    enabled: bool = True
    scaling: dict[nn.Module, float] = field(default_factory=dict)  # each layer's own, at strength 1

    @property
    def tuner(self) -> Any:
        """The tuner object of peft, holding `add_weighted_adapter` and the like; of a prompt, its `PeftModel`."""
        return self.injection.tuner
