"""Hooks by which adapters change what a module gives, before anybody reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class ChangesOutput:
    """What has, or is, a forward hook that changes its module's output."""


def add_output_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Register a forward hook behind those of other adapters, and before all that only read.

    transformers reads `output_hidden_states` by hooks that stay from the first such call on: an adapter that came later
    would change the output behind their back.

    Args:
        module: the one whose output is changed.
        hook: a `ChangesOutput`, or a method of one.
    """
    module.register_forward_hook(hook)
    hooks: Any = module._forward_hooks  # an OrderedDict, which torch declares as a dictionary
    for key in [key for key, other in hooks.items() if not changes_output(other)]:
        hooks.move_to_end(key)


def changes_output(hook: Callable[..., Any]) -> bool:
    """Return whether a forward hook is that of an adapter."""
    return isinstance(getattr(hook, "__self__", hook), ChangesOutput)
