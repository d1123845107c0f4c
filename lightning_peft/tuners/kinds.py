"""Which way a peft method goes onto a backbone."""

from __future__ import annotations

from typing import Any

from lightning_peft.tuners.adaption import AdaptionInjection
from lightning_peft.tuners.injection import Injection
from lightning_peft.tuners.prompts import PromptInjection


def kind_of(config: Any) -> type[Injection]:
    """The kind of injection for a configuration.

    Raises:
        ValueError: no kind fits.
    """
    if config.is_prompt_learning:
        return PromptInjection
    if config.is_adaption_prompt:
        return AdaptionInjection
    if config.peft_type == "XLORA":
        raise ValueError(
            "XLoraConfig mixes LoRA adapters that it loads from other folders by path, so its own folder is no adapter "
            "by itself: train it with peft's own PeftModel."
        )
    return Injection
