"""The arguments that a model's forward takes, also where peft has wrapped it."""

from __future__ import annotations

import inspect

from torch import nn


def accepted_arguments(model: nn.Module) -> set[str]:
    """Return the names of `forward`'s arguments; of a `PeftModel`, whose own forward hides them, the base model's.

    Example:
        >>> sorted(accepted_arguments(nn.Linear(1, 1)))
        ['input', 'self']
    """
    base = getattr(model, "get_base_model", None)
    return set(inspect.signature(type(base() if callable(base) else model).forward).parameters)
