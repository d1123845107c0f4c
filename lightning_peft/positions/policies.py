"""The names of the tokens an edit can touch, and what is said where they cannot be known."""

from __future__ import annotations

import warnings
from typing import Literal

import torch

from lightning_peft.tokens import Tokens

Policy = Literal["answer", "generated", "all"]
POLICIES: tuple[str, ...] = ("answer", "generated", "all")


def check_policy(policy: str) -> None:
    """Check that positions are such as an edit can have.

    Raises:
        ValueError: an unknown selection, or one counted from the end of a text, which an edit cannot see coming.
    """
    if Tokens.parse(policy).needs_end:
        raise ValueError(
            f"positions {policy!r} are counted from the end of a text, which is not known while it is generated: count "
            "from the beginning of a phase, e.g. 'answer[0:3]', or from the end of the prompt, 'prompt[-3:]'."
        )


class PositionsError(RuntimeError):
    """The positions an edit applies to cannot be known for this call."""


class PlainTextWarning(UserWarning):
    """An edit limited to answers acts on every token of a call, since nothing says where the answer begins."""


_warned = False  # in this process


# a compiler runs it while it compiles, and leaves no trace of it in what it makes
@torch.compiler.assume_constant_result
def warn_of_plain_text(policy: str, model: str) -> None:
    """Say once a process that an edit of answers acts on every token of a call of a model, by its class's name."""
    global _warned
    if _warned:
        return
    edited, unknown = "every token", "the answer begins"
    if Tokens.parse(policy).phase == "prompt":
        edited, unknown = "no token", "the prompt ends"
    warnings.warn(
        f"An edit limited to {policy!r} positions acts on {edited} of a call of {model}, since nothing says where "
        f"{unknown}: give prompt_end or labels in the batch, or labels in the call, or make the call within "
        "lightning_peft.answering(model, start=last_prompt_position); where every token is meant, within "
        'lightning_peft.plain_text(model), or let the edit act at positions="all". lm-evaluation-harness tells where '
        "answers begin with its model type lightning-peft (lightning-peft lm-eval). This is said once a process.",
        PlainTextWarning,
        stacklevel=2,
    )
    _warned = True
