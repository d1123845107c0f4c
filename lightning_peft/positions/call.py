"""The tokens of one call of a model: where each stands in its text, and which are padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_peft.positions.context import CallContext
from lightning_peft.positions.past import Past, StateLengths, used_columns
from lightning_peft.positions.policies import PositionsError


@dataclass
class Call:
    """One forward call: `real [B, T]` (not padding), `start [B]` (or `[B, T]`), and what is known of its past.

    `position_ids [B, T]` are the numbers of the tokens in their texts; None where they cannot be known. Of an
    encoder-decoder, the call of the one or the other; `around` is the one that goes on after its decoder's.
    """

    position_ids: Tensor | None
    real: Tensor
    start: Tensor | None
    context: CallContext
    past: Past | None = None
    decodes: bool = False
    around: Call | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, bool] = field(default_factory=dict)

    def read(self) -> Tensor | None:
        """Return how many tokens of each row have been read once this call has ended, `[B]`; None if unknown."""
        if self.position_ids is None:
            return None
        read = (self.position_ids + 1).masked_fill(~self.real, 0).amax(-1)
        before = None if self.past is None else self.past.read
        return read if before is None else torch.maximum(read, before.to(read.device))


def read_call(
    arguments: Mapping[str, Any], context: CallContext, lengths: StateLengths, decodes: bool = False
) -> Call | None:
    """Return the call of some tokens, its start left open; None where there are no tokens.

    Args:
        arguments: of `forward`, by name.
        context: what is known beforehand.
        lengths: of the states that earlier calls of the model left.
        decodes: True of an encoder-decoder, a part of which may be what an explicit mask is for.

    Raises:
        PositionsError: an explicit mask of another shape, unless it may be the other part's.
    """
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor):  # not a token model: only edits of all positions can apply
        return None
    batch, length = tokens.shape[:2]
    attention = arguments.get("attention_mask")
    if not (isinstance(attention, Tensor) and attention.dim() == 2):
        attention = None
    real = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    if attention is not None:
        attention = attention.to(tokens.device)
        if attention.shape[1] > length and not torch.compiler.is_compiling():
            attention = attention[:, : used_columns(arguments, length)]
        real = attention[:, -length:].to(torch.bool)

    generation = None if decodes else context.generation
    position_ids, past = _numbers(arguments.get("position_ids"), batch, length, tokens.device), None
    if generation is not None and position_ids is not None and not torch.compiler.is_compiling():
        if generation.numbered is None:
            generation.check_numbers(position_ids, lengths.past(arguments, batch))
        position_ids = position_ids if generation.numbered else None
    if position_ids is None:
        past = lengths.past(arguments, batch)
        if attention is None and generation is not None and past.known and past.read is None:
            position_ids, real = generation.places(past, batch, length, tokens.device)
        else:
            position_ids = _counted(attention, real, past)

    if context.mask is not None and context.mask.shape != (batch, length):
        if not decodes:
            raise wrong_mask(context.mask, real)
        context = replace(context, mask=None)
    return Call(position_ids, real, None, context, past)


def _numbers(position_ids: Any, batch: int, length: int, device: torch.device) -> Tensor | None:
    """Return position ids as `[B, T]` where they are one for each token; None of those with several (M-RoPE)."""
    if not isinstance(position_ids, Tensor) or position_ids.dim() > 2 or position_ids.shape[-1] != length:
        return None
    if position_ids.dim() == 2 and position_ids.shape[0] not in (1, batch):
        return None
    return position_ids.to(device).expand(batch, length)


def _counted(attention: Tensor | None, real: Tensor, past: Past) -> Tensor | None:
    """Return each token's number in its text by counting those before it, `[B, T]`; None where they are unknown."""
    batch, length = real.shape
    if attention is not None and (attention.shape[1] > length or past.empty):  # of the whole text
        return (attention.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    if not past.known:
        return None
    before = past.columns if past.read is None else past.read.to(real.device)[:, None]
    if attention is None:
        return (before + torch.arange(length, device=real.device)).expand(batch, length)
    return (before + real.long().cumsum(-1) - 1).clamp(min=0)


def start_of(call: Call, labels: Any = None, noted: Tensor | None = None) -> Tensor | None:
    """Return the number of the last prompt token of each row or token, by the first rule that tells it; else None.

    Args:
        call: with what is known beforehand.
        labels: the call's own, `[B, T]`; of an encoder-decoder none, since they are its decoder's tokens.
        noted: the batch's, `[B, T]`, of which `generate`, which reads prompts, knows nothing.
    """
    (batch, length), device, context = call.real.shape, call.real.device, call.context
    for start in (context.start, context.batch):
        if start is not None:
            return _rows(start, batch, length, device)
    generation, places = context.generation, call.position_ids
    labels = noted if labels is None and generation is None else labels
    if isinstance(labels, Tensor) and places is not None and labels.shape == places.shape:
        answered = labels != -100
        first = (answered.long().argmax(-1) - 1).clamp(min=0)
        start = places.gather(1, first[:, None].to(device)).squeeze(1)
        # a row without any label has no answer: nothing of it is edited
        return start.masked_fill(~answered.any(-1).to(device), torch.iinfo(torch.long).max)
    if generation is not None and not generation.lacks_prompt:
        return _rows(generation.start, batch, length, device)
    return None


def _rows(start: Tensor, batch: int, length: int, device: torch.device) -> Tensor:
    """Return a start for each row or token; beams and returned sequences repeat a prompt's rows side by side."""
    start = (start if start.dim() == 2 else start.reshape(-1)).to(device)
    if batch % len(start) or start.shape[1:] not in ((), (1,), (length,)):
        sizes = " x ".join(map(str, start.shape))
        raise PositionsError(f"{sizes} answer starts were given for a call of {batch} rows of {length} tokens.")
    return start.repeat_interleave(batch // len(start), dim=0)


def wrong_mask(mask: Tensor, real: Tensor) -> PositionsError:
    """Return the error of an explicit mask that has not the shape of its call."""
    return PositionsError(
        f"The explicit position mask has shape {tuple(mask.shape)} but this call has {tuple(real.shape)}."
    )
