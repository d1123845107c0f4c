"""Log-probabilities of chosen tokens, over the vocabulary a few tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LOGITS = 2**26  # numbers of logits that are held at once, where a single text does not need more: 256 MiB in float32
TOKENS = 32  # whose logits are normalised at once


def target_logprobs(logits: Tensor, columns: Tensor, targets: Tensor, normalise: bool = True) -> Tensor:
    """Return the log-probability of each target, in nats, `[R, N]`.

    Besides the logits, float32 copies of 32 tokens' are held.

    Args:
        logits: `[R, K, V]`.
        columns: `[N]`, the number of the token, of K, after which a target comes.
        targets: `[N]`.
        normalise: whether these are logits; else they are the scores of tokens themselves.

    Example:
        >>> target_logprobs(torch.zeros(1, 1, 4), torch.tensor([0, 0]), torch.tensor([2, 3]))
        tensor([[-1.3863, -1.3863]])
    """
    chosen = logits[:, columns, targets].float()
    if not normalise:
        return chosen
    totals = [part.float().logsumexp(-1) for part in logits.flatten(0, 1).split(TOKENS)]
    return chosen - torch.cat(totals).view(logits.shape[:2])[:, columns]


def label_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum each row's log-probabilities of its labels, in nats, `[C]`; those that are -100 do not count.

    Args:
        logits: `[C, U, V]`.
        labels: `[C, U]`.
    """
    parts = zip(logits.flatten(0, 1).split(TOKENS), labels.flatten().clamp(min=0).split(TOKENS), strict=True)
    logprobs = [part.float().log_softmax(-1).gather(1, at[:, None])[:, 0] for part, at in parts]
    return torch.cat(logprobs).view(labels.shape).masked_fill(labels == -100, 0.0).sum(1)


def vocabulary(backbone: nn.Module) -> int:
    """Return the number of words in a language model's vocabulary; 1 where its configuration does not say it."""
    config: Any = getattr(backbone, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(config, "vocab_size", None) or 1)
