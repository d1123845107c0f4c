"""The divergence of a model's predictions under two settings of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.positions import answering
from lightning_peft.prompt_end import prompt_end


@dataclass(frozen=True)
class Divergence:
    """KL divergence of next-token distributions, in nats, over the answer tokens of some texts.

    Args:
        mean: over all answer tokens.
        max: the largest.
        tokens: how many there were.
    """

    mean: float
    max: float
    tokens: int

    def __str__(self) -> str:
        return f"KL {self.mean:.3g} nats a token on average, {self.max:.3g} at most, over {self.tokens} answer tokens"


@torch.no_grad()
def divergence(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    one: Callable[[], AbstractContextManager[Any]],
    other: Callable[[], AbstractContextManager[Any]],
) -> Divergence | None:
    """Compute KL(one ‖ other) of a causal language model's predictions at each answer token.

    Args:
        model: gives `logits [B, T, V]`.
        batches: `input_ids [B, T]`, `attention_mask [B, T]` and `prompt_end [B]`, the position id of the last prompt
            token.
        one: makes the context in which the model has the one setting.
        other: the same for the other.

    Returns:
        None where there are no batches.
    """
    divergences = []
    for batch in batches:
        mask, start = batch["attention_mask"].bool(), prompt_end(batch)
        if start is None:
            raise ValueError("A batch has no prompt_end, the position ids [B] of its last prompt tokens: add it.")
        log_probs = []
        for setting in (one, other):
            with setting(), answering(model, start=start):
                output: Any = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            log_probs.append(output.logits.float().log_softmax(-1))
        kl = (log_probs[0].exp() * (log_probs[0] - log_probs[1])).sum(-1)
        places = mask.cumsum(-1) - 1
        # what is said at a text's last token is about no token of it
        about = mask & (places >= start[:, None]) & (places < mask.sum(-1, keepdim=True) - 1)
        divergences.append(kl[about].clamp(min=0))
    if not divergences:
        return None
    values = torch.cat(divergences)
    return Divergence(float(values.mean()), float(values.max()), len(values))
