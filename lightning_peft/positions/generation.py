"""What is known of a call of `generate` before it runs: its prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_peft.positions.past import Past


@dataclass(eq=False)
class Generation:
    """One call of `generate`, the same object in all its steps.

    Attributes:
        start: `[B]`, the number of each prompt's last token; empty where the prompt is no tokens.
        mask: `[B, P]`, 0 at the prompts' padding, where there may be some.
        numbered: whether the position ids that the model passes itself in this call are the tokens' numbers in their
            text, which those of pictures, or counted from 1, are not; None before the first step has told.
    """

    start: Tensor
    mask: Tensor | None = None
    numbered: bool | None = None

    @property
    def lacks_prompt(self) -> bool:
        """True where the prompt is no tokens."""
        return not len(self.start)

    def places(self, past: Past, batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the numbers of a step's tokens in their texts and which are no padding, `[B, T]` each.

        Beams and returned sequences repeat a prompt's rows side by side.
        """
        end = past.columns + length
        if self.mask is None or batch % len(self.mask):
            places = torch.arange(past.columns, end, device=device).expand(batch, length)
            return places, torch.ones(batch, length, dtype=torch.bool, device=device)
        mask = self.mask.to(device).long().repeat_interleave(batch // len(self.mask), dim=0)
        mask = pad(mask, (0, max(end - mask.shape[1], 0)), value=1)[:, :end]  # what is generated is no padding
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        return places[:, past.columns :], mask[:, past.columns :].bool()

    def check_numbers(self, position_ids: Tensor, past: Past) -> None:
        """Note whether the position ids `[B, T]` of the first step are the tokens' numbers."""
        batch, length = position_ids.shape
        width = None if self.mask is None else self.mask.shape[1]
        if self.lacks_prompt or not past.known or past.read is not None or (past.columns and width == length):
            self.numbered = True  # in the last case a prefix of no tokens lies in the cache
            return
        places, real = self.places(past, batch, length, position_ids.device)
        self.numbered = bool(((places == position_ids) | ~real).all())


def generation_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Generation:
    """Return what the arguments of a model's `generate` say of its prompts."""
    prompt = embedded = kwargs.get("inputs_embeds")  # which are what is read, where tokens are given beside them
    if prompt is None:
        given = (args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids"))
        prompt = next((tokens for tokens in given if tokens is not None), None)
    if prompt is None or (embedded is None and (prompt.dim() != 2 or prompt.is_floating_point())):
        return Generation(torch.empty(0, dtype=torch.long))
    mask = kwargs.get("attention_mask")
    if mask is None and prompt.dim() == 2:
        # as transformers does: without a mask, pad tokens are padding unless padding is also an end token
        config = config_of(model, args, kwargs)
        pad_token = kwargs.get("pad_token_id", getattr(config, "pad_token_id", None))
        end = kwargs.get("eos_token_id", getattr(config, "eos_token_id", None))
        ends = end if isinstance(end, list | tuple) else [end]
        if pad_token is not None and pad_token not in ends:
            mask = prompt != pad_token
    if mask is None:
        return Generation(torch.full((prompt.shape[0],), prompt.shape[1] - 1, device=prompt.device))
    return Generation(mask.long().sum(-1) - 1, mask)


def config_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the generation config of a call of a model's `generate`; None without one."""
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    return given or getattr(model, "generation_config", None)
