"""Prefix tuning as one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn

from lightning_peft.backbone import counts
from lightning_peft.callbacks.tuning.prompt_tuning import PromptTuning
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig


class PrefixTuning(AdapterCallback):
    """Prefix tuning: trained keys and values that every layer's attention finds before those of the tokens.

    Li and Liang 2021, arXiv:2101.00190. Trainable parameters: `num_virtual_tokens * 2 * layers * key_value_width`;
    with projection a network computes them, and is trained instead. Given as a past (`past_key_values`), so for models
    that generate, without activation checkpointing.

    Args:
        num_virtual_tokens: the length of the prefix, at least 1. The paper's choice is 10 for generation from tables.
        prefix_projection: compute the prefix by a two-layer perceptron, the paper's reparametrisation.
        encoder_hidden_size: the perceptron's hidden size; default the model's width.
        backbone: see `AdapterOptions`; it must be a transformers model that generates.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: no virtual token is asked for, or gradient checkpointing is.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import PrefixTuning
        >>> trainer = L.Trainer(callbacks=[PrefixTuning(num_virtual_tokens=10)], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "prefix_tuning"

    exempt: Mapping[str, str] = PromptTuning.exempt
    law_examples: Mapping[str, LawExample] = {
        "PrefixTuning": LawExample({"num_virtual_tokens": 3}, ("attention", "transformers", "decoder"))
    }

    def __init__(
        self,
        num_virtual_tokens: int = 10,
        prefix_projection: bool = False,
        encoder_hidden_size: int | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if num_virtual_tokens < 1:
            raise ValueError(f"num_virtual_tokens must be at least 1, got {num_virtual_tokens}.")
        if options.get("gradient_checkpointing"):
            raise ValueError(
                "Prefix tuning cannot have gradient_checkpointing: transformers' layers drop a past when they are "
                "checkpointed, and the prefix is one."
            )
        super().__init__(**options)
        self.num_virtual_tokens = num_virtual_tokens
        self.prefix_projection, self.encoder_hidden_size = prefix_projection, encoder_hidden_size

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from peft import PrefixTuningConfig

        width = getattr(getattr(backbone, "config", None), "hidden_size", None)
        return PrefixTuningConfig(
            num_virtual_tokens=self.num_virtual_tokens,
            prefix_projection=self.prefix_projection,
            encoder_hidden_size=(self.encoder_hidden_size or width) if self.prefix_projection else None,  # type: ignore[arg-type]
        )

    def trainable_parameters(self, backbone: Any) -> int | None:
        if self.prefix_projection:
            return None
        widths = [keys for keys, _ in counts.prefixes(backbone)[-backbone.config.num_hidden_layers :]]
        return 2 * self.num_virtual_tokens * sum(widths)
