"""The hidden states that a language model puts through its head, without the logits that come of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def head_input(backbone: nn.Module, head: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    """Run a model and return what its head is given, `[B, T, width]`.

    A hook on the head notes its input and lets the last token pass, so that no logits of all tokens are made.

    Args:
        backbone: a causal language model, whose call gives `logits [B, T, vocabulary]`, alone or as an attribute.
        head: its `get_output_embeddings()`.
        inputs: the arguments of the call.

    Returns:
        None where the head's output alone is not the logits (they are capped or scaled), or the head cannot be called
        alone.
    """
    head_inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        head_inputs.append(args[0])
        return (args[0][:, -1:], *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        logits = logits_of(backbone(**inputs))
        handle.remove()
        alone = len(head_inputs) == 1 and torch.equal(head(head_inputs[0][:, -1:]).float(), logits.float())
    except RuntimeError:  # an edit of the head that must see all its positions
        alone = False
    finally:
        handle.remove()
    return head_inputs[0] if alone else None


def logits_of(output: Any) -> Tensor:
    """Return the logits of a language model's output, which may be these alone."""
    return output if isinstance(output, Tensor) else output.logits
