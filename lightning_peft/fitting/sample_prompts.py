"""Prompts of the batches that pass by, and what a model writes after them with an adapter and without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.window import context_window
from lightning_peft.packing.generation import GreedyWriter
from lightning_peft.prompt_end import prompt_end, token_labels

LONGEST = 512  # tokens of a prompt that are read; of a longer one its end
_SHOWN = 160  # characters of a prompt and of an answer
_ROWS = 8  # of a batch that are looked at


class SamplePrompts:
    """The first prompts of validation batches, else of training batches: tokens, copied as they pass by.

    Args:
        count: how many different ones.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.validated: list[list[int]] = []
        self.trained: list[list[int]] = []

    def note(self, batch: Any, validating: bool) -> None:
        """Look at a batch, until there are enough prompts; batches of other forms have none."""
        held = self.validated if validating else self.trained
        if len(held) < self.count and not (not validating and len(self.validated) == self.count):
            held += [prompt for prompt in prompts_of(batch) if prompt not in held][: self.count - len(held)]

    @property
    def rows(self) -> list[list[int]]:
        """The tokens of the prompts."""
        return self.validated or self.trained


def prompts_of(batch: Any) -> list[list[int]]:
    """Return the tokens of each different prompt of a batch, of the first rows; none where it does not say them.

    Example:
        >>> ids, mask = torch.tensor([[0, 5, 6, 7]]), torch.tensor([[0, 1, 1, 1]])
        >>> prompts_of({"input_ids": ids, "attention_mask": mask, "prompt_end": torch.tensor([1])})
        [[5, 6]]
        >>> prompts_of({"input_ids": ids, "labels": torch.tensor([[-100, -100, -100, 7]])})
        [[0, 5, 6]]
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or "pixel_values" in batch or "position_ids" in batch:
        return []
    mask, ends, labels = batch.get("attention_mask"), prompt_end(batch), token_labels(batch)
    real = mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids).bool()
    prompts: list[list[int]] = []
    for i in range(min(_ROWS, len(ids))):
        if ends is not None:
            prompt = ids[i][real[i]][: int(ends[i]) + 1].tolist()
        elif labels is not None and bool((labels[i] != -100).any()):
            begin = int((labels[i] != -100).long().argmax())
            prompt = ids[i, :begin][real[i, :begin]].tolist()
        else:
            continue
        if prompt and prompt not in prompts:
            prompts.append(prompt)
    return prompts


@dataclass(frozen=True)
class Sample:
    """What a model writes after a prompt, without an adapter and with it; each cut to what a terminal shows."""

    prompt: str
    before: str
    after: str


def write_samples(
    backbone: nn.Module,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    off: AbstractContextManager[Any],
    new_tokens: int,
) -> list[Sample]:
    """Return greedy answers with an adapter and without it, each up to its first line's end.

    Args:
        backbone: a causal language model of transformers, in evaluation mode, the adapter on it.
        tokenizer: its tokenizer.
        rows: the prompts' tokens.
        off: a context without the adapter, entered once.
        new_tokens: of each answer at most.
    """
    window = context_window(backbone)
    longest = LONGEST if window is None else min(LONGEST, window.tokens - new_tokens)
    rows = [row[-longest:] for row in rows]
    after = _answers(backbone, tokenizer, rows, new_tokens)
    with off:
        before = _answers(backbone, tokenizer, rows, new_tokens)
    prompts = [_end(str(tokenizer.decode(list(row), skip_special_tokens=True))) for row in rows]
    return [Sample(*texts) for texts in zip(prompts, map(_beginning, before), map(_beginning, after), strict=True)]


def _answers(backbone: nn.Module, tokenizer: Any, rows: Sequence[Sequence[int]], new_tokens: int) -> list[str]:
    if getattr(getattr(backbone, "config", None), "is_encoder_decoder", False):
        return [_translated(backbone, tokenizer, row, new_tokens) for row in rows]
    writer, answers = GreedyWriter(backbone, tokenizer), []
    for row in rows:  # one at a time: nothing is padded, and nothing tried
        ids = torch.tensor([list(row)])
        answers += writer.write(ids, torch.ones_like(ids), lambda text: "\n" in text.lstrip(), new_tokens)
    return answers


@torch.no_grad()
def _translated(backbone: Any, tokenizer: Any, row: Sequence[int], new_tokens: int) -> str:
    ids = torch.tensor([list(row)], device=next(backbone.parameters()).device)
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": new_tokens}
    written = backbone.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return str(tokenizer.decode(written[0].tolist(), skip_special_tokens=True))


def _end(text: str) -> str:
    """Return the end of a prompt on one line: its last two lines, since it may begin with demonstrations."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    shown = " | ".join(lines[-2:])
    return shown if len(shown) <= _SHOWN else f"…{shown[-_SHOWN:]}"


def _beginning(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:_SHOWN] if lines else "(nothing)"
