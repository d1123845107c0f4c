"""Several methods at once, as one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

from torch import nn

from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig


class Composite(AdapterCallback):
    """Train several adapters on one backbone together; they are a stack, saved, scaled and switched part by part.

    Args:
        methods: for each adapter, the callback that says what it is, innermost first; the adapter's name is this
            callback's name, `-` and the key. The callbacks themselves are not given to the Trainer.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: there is no method, or one of them computes an edit instead of training.

    Example:
        >>> from lightning_peft.callbacks import Composite, LoRA
        >>> Composite({"attention": LoRA(r=8, within="attention"), "mlp": LoRA(r=2, within="mlp")}).names
        ('composite-attention', 'composite-mlp')
    """

    default_name = "composite"
    law_examples: Mapping[str, LawExample] = {}

    def __init__(
        self,
        methods: Mapping[str, AdapterCallback],
        **options: Unpack[AdapterOptions],
    ) -> None:
        if not methods:
            raise ValueError(f"{type(self).__name__} needs at least one method.")
        if edits := [type(method).__name__ for method in methods.values() if method.computed]:
            raise ValueError(f"{type(self).__name__} trains its methods together, and {edits[0]} is not trained.")
        super().__init__(**options)
        self.methods = dict(methods)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{self.name}-{key}" for key in self.methods)

    def make_configs(self, backbone: nn.Module) -> dict[str, PeftConfig]:
        return {
            name: method.make_config(backbone) for name, method in zip(self.names, self.methods.values(), strict=True)
        }

    def trainable_parameters(self, backbone: nn.Module) -> int | None:
        parts = [method.trainable_parameters(backbone) for method in self.methods.values()]
        return sum(part or 0 for part in parts) if None not in parts else None
