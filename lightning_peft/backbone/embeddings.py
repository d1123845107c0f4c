"""The table of a model's tokens."""

from __future__ import annotations

from torch import nn


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the module that embeds a model's tokens; None where there is none, or the model cannot say.

    `BartForCausalLM` and its kin have one, but transformers raises `NotImplementedError` instead of returning it.
    """
    find = getattr(model, "get_input_embeddings", None)
    try:
        table = find() if callable(find) else None
    except NotImplementedError:
        return None
    return table if isinstance(table, nn.Module) else None
