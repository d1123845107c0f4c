"""The position ids of a call: each token's number in its text."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_peft.backbone.accepted_arguments import accepted_arguments
from lightning_peft.backbone.window import first_position


def numbers_from_zero(model: nn.Module) -> bool:
    """Return whether a model takes position ids, the first token's being 0.

    RoBERTa and its kind count from behind their padding's, and number tokens themselves where no ids are passed.
    """
    return "position_ids" in accepted_arguments(model) and first_position(model) == 0


def token_numbers(model: nn.Module, attention_mask: Tensor) -> dict[str, Tensor]:
    """Return `position_ids [B, T]` as an argument of a call, so that padding on the left changes nothing.

    Args:
        model: it is left out where the model takes none or counts from elsewhere, see `numbers_from_zero`.
        attention_mask: `[B, T]`, 1 at tokens and 0 at padding.
    """
    return {"position_ids": places(attention_mask)} if numbers_from_zero(model) else {}


def places(attention_mask: Tensor) -> Tensor:
    """Return each token's number in its text, `[B, T]`; padding has that of a token beside it, or 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
