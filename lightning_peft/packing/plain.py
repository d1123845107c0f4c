"""Texts scored row by row: the definition that packed scoring must agree with, and what stands in for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.accepted_arguments import accepted_arguments
from lightning_peft.backbone.head_input import head_input
from lightning_peft.backbone.token_numbers import token_numbers
from lightning_peft.packing import logprobs
from lightning_peft.packing.attention import attention_of
from lightning_peft.packing.logprobs import target_logprobs, vocabulary
from lightning_peft.positions import answering

TOKENS = 4096  # of one call, padding included, where it has several rows


@dataclass(frozen=True)
class Row:
    """A text to score.

    Args:
        number: which of the texts.
        tokens: `[T]`.
        start: the number of its last prompt token, whose logits predict the answer's first.
    """

    number: int
    tokens: Sequence[int]
    start: int


def score_plainly(
    backbone: nn.Module, rows: Sequence[Sequence[int]], starts: Sequence[int], normalise: bool = True
) -> Tensor:
    """Score every row whole, padded on the right, a bounded number of rows in a call.

    Logits are made of the answers' columns alone: by the model (`logits_to_keep`), or else by calling its head on what
    the model gives it. With V words in the vocabulary, the numbers of logits held at once, besides float32 copies of 32
    tokens', are at most

    - `max(2^26, K V)`, K the tokens of the longest answer, where the model takes `logits_to_keep`;
    - `max(2^26, 32 V)`, where its head can be called alone;
    - `max(2^26, T V)`, T the tokens of the longest row, where a model allows neither.

    A model that caps or scales its logits holds them twice or three times meanwhile. Hidden states are those of 4,096
    tokens, or of one row where that is longer.

    Args:
        backbone: a causal language model of transformers. Whatever adapters are active count.
        rows: token ids, without padding.
        starts: for each row, the number of its last prompt token.
        normalise: whether the model gives logits; else what it gives are the scores of tokens, which are summed.

    Returns:
        `[C]`, the sums over the answers' tokens, in nats, float32 on the CPU.
    """
    scores = torch.empty(len(rows))
    texts = [Row(i, row, start) for i, (row, start) in enumerate(zip(rows, starts, strict=True))]
    keeps = "logits_to_keep" in accepted_arguments(backbone)
    head = None if keeps else getattr(backbone, "get_output_embeddings", lambda: None)()
    for part in _parts(backbone, texts, _predicting if keeps else _last):
        if keeps:
            values: list[Tensor] | None = _by_columns(backbone, part, normalise)
        else:
            values = None if head is None else _by_head(backbone, head, part, normalise)
        if values is None:
            head = None
            smaller = _parts(backbone, part, _all)
            values = [value for some in smaller for value in _by_all_logits(backbone, some, normalise)]
        scores[[row.number for row in part]] = torch.stack(values).cpu()
    return scores


def _by_columns(backbone: nn.Module, part: list[Row], normalise: bool) -> list[Tensor]:
    """Let the model make logits of the columns in which any row has an answer."""
    inputs, start, device = _inputs(backbone, part)
    width = inputs["input_ids"].shape[1]
    columns = torch.tensor(sorted({column for row in part for column in _predicting(row)}), device=device)
    with answering(backbone, start=start):
        # counted from the end: a prompt's virtual tokens stand before the first
        logits = backbone(**inputs, logits_to_keep=columns - width).logits
    first = torch.searchsorted(columns, start.to(device)).tolist()  # from there on they are the row's own
    return [
        _answer_logprob(logits[i, at : at + len(_predicting(row))], row, normalise)
        for i, (row, at) in enumerate(zip(part, first, strict=True))
    ]


def _by_head(backbone: nn.Module, head: nn.Module, part: list[Row], normalise: bool) -> list[Tensor] | None:
    """Call the head on the tokens that predict an answer's; None where that does not give the model's logits."""
    inputs, start, device = _inputs(backbone, part)
    with answering(backbone, start=start):
        hidden = head_input(backbone, head, inputs)
    if hidden is None:
        return None
    hidden = hidden[:, -inputs["input_ids"].shape[1] :]  # behind a prompt's virtual tokens
    values = []
    for i, row in enumerate(part):
        states = hidden[i, row.start : len(row.tokens) - 1].split(logprobs.TOKENS)
        targets = torch.tensor(_targets(row), device=device).split(logprobs.TOKENS)
        pieces = [
            target_logprobs(head(state[None]), torch.arange(len(state), device=device), words, normalise)
            for state, words in zip(states, targets, strict=True)
        ]
        values.append(torch.cat(pieces, dim=1).sum())
    return values


def _by_all_logits(backbone: nn.Module, part: list[Row], normalise: bool) -> list[Tensor]:
    """Let the model make logits of all columns."""
    inputs, start, _ = _inputs(backbone, part)
    with answering(backbone, start=start):
        # behind a prompt's virtual tokens
        logits = backbone(**inputs).logits[:, -inputs["input_ids"].shape[1] :]
    return [_answer_logprob(logits[i, row.start : len(row.tokens) - 1], row, normalise) for i, row in enumerate(part)]


def _answer_logprob(logits: Tensor, row: Row, normalise: bool) -> Tensor:
    """Sum the log-probabilities of a row's answer tokens, from the logits that predict them, `[K, V]`."""
    places = torch.arange(len(logits), device=logits.device)
    return target_logprobs(logits[None], places, torch.tensor(_targets(row), device=logits.device), normalise).sum()


def _inputs(backbone: nn.Module, part: list[Row]) -> tuple[dict[str, Any], Tensor, torch.device]:
    """Return the arguments of a call, where each row's answer begins, and their device."""
    device = next(backbone.parameters()).device
    width = max(len(row.tokens) for row in part)
    ids = torch.tensor([[*row.tokens, *[0] * (width - len(row.tokens))] for row in part], device=device)
    lengths = torch.tensor([len(row.tokens) for row in part], device=device)
    mask = (torch.arange(width, device=device) < lengths[:, None]).long()
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    return inputs | token_numbers(backbone, mask), torch.tensor([row.start for row in part]), device


def _parts(backbone: nn.Module, rows: Sequence[Row], columns: Callable[[Row], range]) -> Iterator[list[Row]]:
    """Yield the rows of each call, of like length; `columns` gives those of which logits are made for a row."""
    longest, words = attention_of(backbone).longest_text, vocabulary(backbone)
    part: list[Row] = []
    made: set[int] = set()  # for all rows, if for any
    for row in sorted(rows, key=lambda row: len(row.tokens)):
        width, count, more = len(row.tokens), len(part) + 1, made | {*columns(row)}
        fits = count * width <= TOKENS and count * len(more) * words <= logprobs.LOGITS and width <= longest
        if part and not fits:
            yield part
            part, more = [], {*columns(row)}
        part, made = [*part, row], more
    if part:
        yield part


def _predicting(row: Row) -> range:
    """Return the numbers of the tokens that predict the answer's."""
    return range(row.start, len(row.tokens) - 1)


def _last(row: Row) -> range:
    """Return the one column that a hook on the head lets pass, whose number is that of any row's."""
    return range(1)


def _all(row: Row) -> range:
    return range(len(row.tokens))


def _targets(row: Row) -> list[int]:
    return list(row.tokens[row.start + 1 :])
