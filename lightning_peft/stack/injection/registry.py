"""Which way a peft method goes onto a backbone."""

from __future__ import annotations

from typing import Any

from lightning_peft.moved.names import keep_old_names
from lightning_peft.stack.injection.adaption_prompt import AdaptionInjection
from lightning_peft.stack.injection.injection import Injection
from lightning_peft.stack.injection.mixture import MixtureInjection
from lightning_peft.stack.injection.prompt_learning import PromptInjection


def injection_for(config: Any) -> type[Injection]:
    """The kind of injection for a configuration."""
    if config.is_prompt_learning:
        return PromptInjection
    if config.is_adaption_prompt:
        return AdaptionInjection
    if config.peft_type == "XLORA":
        return MixtureInjection
    return Injection


keep_old_names(__name__)
