"""One call of a causal language model, its head kept apart: log-probabilities of a few hundred tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft.backbone.head_input import head_input, logits_of
from lightning_peft.backbone.token_numbers import token_numbers


class Predictions:
    """What a model predicts after each token of a batch, from one call.

    Logits of a whole batch are large: 8 texts of 512 tokens, over 150,000 words, take 5 GB in float64. So only the
    hidden states before the head are kept where the head is all that follows. A hook on the head notes what it is
    given and lets the last token pass. Where the head of that token is not the logits that come out (they are capped or
    scaled), or the head cannot be called alone, all logits are kept.

    Args:
        backbone: a causal language model, whose call gives `logits [B, T, vocabulary]`, alone or as an attribute.
        ids: `[B, T]`.
        mask: `[B, T]`, 1 at tokens and 0 at padding.
    """

    def __init__(self, backbone: nn.Module, ids: Tensor, mask: Tensor) -> None:
        inputs = {"input_ids": ids, "attention_mask": mask} | token_numbers(backbone, mask)
        head = getattr(backbone, "get_output_embeddings", lambda: None)()
        hidden = None if head is None else head_input(backbone, head, inputs)
        self.head: nn.Module | None = None if hidden is None else head
        states = logits_of(backbone(**inputs)) if hidden is None else hidden
        self.kept = states[:, -ids.shape[1] :]  # behind a prompt's virtual tokens

    def logprobs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return log-probabilities `[N, vocabulary]` after the tokens at these places, float64 where the device has it.

        Args:
            rows: `[N]`.
            columns: `[N]`.
        """
        states = self.kept[rows, columns]
        logits = states if self.head is None else self.head(states[None])[0]
        return logits.log_softmax(-1, dtype=torch.float32 if logits.device.type == "mps" else torch.float64)
