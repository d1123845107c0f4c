"""Any peft configuration as a callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn

from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions, by_name
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    from peft import PeftConfig


class PEFT(AdapterCallback):
    """Adapt a model by any peft method: freeze the backbone, inject, train, save only the adapter.

    Args:
        config: a `peft.PeftConfig`; in YAML a `class_path` with `init_args`. It is copied, not changed.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: see `AdapterCallback`.

    Example:
        >>> import lightning as L
        >>> from peft import IA3Config
        >>> from lightning_peft.callbacks import PEFT
        >>> trainer = L.Trainer(callbacks=[PEFT(IA3Config(target_modules=["k_proj"], feedforward_modules=[]))],
        ...                     accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    law_examples: Mapping[str, LawExample] = {}

    def __init__(self, config: PeftConfig, *positional: Any, **options: Unpack[AdapterOptions]) -> None:
        super().__init__(**by_name(positional, options))
        self.config = config

    @property
    def target_modules(self) -> list[str] | str | None:
        """The modules that the configuration names to be adapted."""
        return getattr(self.config, "target_modules", None)

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        return self.config
