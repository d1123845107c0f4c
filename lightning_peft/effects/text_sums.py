"""Cross-entropy and KL(base ‖ adapted) of a causal language model on text, summed over the tokens of each text.

They are those of Li et al. 2023 (arXiv:2306.03341, table 1), in nats, with one difference: every position is edited,
and the base model and the adapted one see the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.evaluating import evaluating
from lightning_peft.backbone.window import check_lengths, context_window, lengths_of
from lightning_peft.effects.predictions import Predictions
from lightning_peft.effects.slices import TextSlice, text_batches
from lightning_peft.positions import plain_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Off = Callable[[], AbstractContextManager[Any]]
_CHUNK = 256  # tokens whose log-probabilities over the vocabulary are held at once


def text_effects(
    backbone: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: TextSlice,
    off: Off | None = None,
    batch_size: int = 8,
) -> Tensor:
    """Return `batch_effects` of every document of a slice, `[documents, 4]`.

    Args:
        backbone: a causal language model, whatever adapters are on it; it is run in evaluation mode.
        tokenizer: of the model.
        text: the slice; its hash belongs to the result.
        off: switches the adapters off for a while, such as `adapters(module).disabled`; None where there are none.
        batch_size: documents of a call.

    Example:
        >>> values = text_effects(backbone, tokenizer, text_slice(), adapters(module).disabled)  # doctest: +SKIP
        >>> TextEffects()(values)  # doctest: +SKIP
        {'ce_base': 3.41, 'ce': 3.43, 'kl': 0.02}
    """
    return effects_of(backbone, text_batches(text, tokenizer, batch_size), off, "neutral texts")


def effects_of(
    backbone: nn.Module, batches: Iterable[Mapping[str, Tensor]], off: Off | None = None, what: str = "texts"
) -> Tensor:
    """Return `batch_effects` of every row of batches, `[texts, 4]`; the model is run in evaluation mode.

    Args:
        backbone: as of `text_effects`.
        batches: see `token_batches`.
        off: as of `text_effects`.
        what: the texts are, in the plural, where a warning says how many are longer than the model's window.
    """
    device = next(backbone.parameters()).device
    batches = list(batches)
    check_lengths(backbone, (n for batch in batches for n in lengths_of(batch)), what, cut=True)
    with evaluating(backbone):
        return torch.cat([batch_effects(backbone, {k: v.to(device) for k, v in b.items()}, off) for b in batches])


@torch.no_grad()
def batch_effects(backbone: nn.Module, batch: Mapping[str, Tensor], off: Off | None = None) -> Tensor:
    """Sum effects over the predicted tokens of each row, from the same logits: their number, cross-entropy of the base
    and of the adapted model, and KL(base ‖ adapted).

    The language-model head is computed for a few hundred tokens at a time. Log-probabilities and sums are float64 where
    the device has it, so that a model's KL with itself is exactly 0 and a small one does not drown in rounding.

    Args:
        backbone: a causal language model in evaluation mode.
        batch: `input_ids [B, T]` and `attention_mask [B, T]`; what exceeds the model's context is left out.
        off: as of `text_effects`.

    Returns:
        `[B, 4]` on the CPU: tokens, and three sums in nats.

    Raises:
        ValueError: the backbone is an encoder-decoder, whose text has no next token.
    """
    config = getattr(backbone, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"Side effects on text need a causal language model, and {type(backbone).__name__} is none.")
    check_lengths(backbone, lengths_of(batch), "neutral texts", cut=True)
    window = context_window(backbone)
    limit = None if window is None else window.tokens
    ids, mask = batch["input_ids"][:, :limit], batch["attention_mask"][:, :limit]
    rows, columns = (mask[:, :-1] * mask[:, 1:]).nonzero(as_tuple=True)
    with plain_text(backbone):
        adapted = Predictions(backbone, ids, mask)
        base = adapted
        if off is not None:
            with off():
                base = Predictions(backbone, ids, mask)
    sums = torch.zeros(len(ids), 4, dtype=torch.float64)
    for start in range(0, len(rows), _CHUNK):
        at = rows[start : start + _CHUNK], columns[start : start + _CHUNK]
        before = after = adapted.logprobs(*at)
        if off is not None:
            with off():
                before = base.logprobs(*at)
        targets = ids[at[0], at[1] + 1][:, None]
        ce = [-logprobs.gather(1, targets)[:, 0] for logprobs in (before, after)]
        kl = (before.exp() * (before - after)).sum(-1)
        values = torch.stack([torch.ones_like(kl), *ce, kl], dim=1)
        sums.index_add_(0, at[0].cpu(), values.double().cpu())
    return sums
