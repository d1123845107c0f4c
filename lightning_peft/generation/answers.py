"""Answers to many prompts, in batches of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_peft.generation.adapted import AdaptedModel
from lightning_peft.generation.decoding import Decoding
from lightning_peft.generation.prompts import Prompt, encode, room_behind, turn_ends
from lightning_peft.packing.generation import GreedyWriter
from lightning_peft.positions import PositionsError


class Answer(NamedTuple):
    """An answer to one of several prompts.

    Args:
        number: of the prompt, from 0.
        text: what the adapted model wrote.
        base: what the base wrote, where it was asked too.
    """

    number: int
    text: str
    base: str | None = None


def answers(
    adapted: AdaptedModel,
    prompts: Sequence[Prompt],
    *,
    chat: bool = False,
    system: str | None = None,
    batch_size: int = 8,
    **decoding: Any,
) -> list[str]:
    """Return the answers to prompts, in their order.

    Args:
        adapted: the model.
        prompts: texts, or chats as lists of messages.
        chat: put texts as a user's turn in the model's chat template.
        system: a message before each chat.
        batch_size: prompts that are answered together.
        **decoding: as of `Decoding`: `max_new_tokens`, `temperature`, `top_p`, `seed`.

    Raises:
        PromptError: before anything is written, for a prompt that cannot be answered; see `encode`.

    Example:
        >>> from lightning_peft.generation import answers, load
        >>> answers(load("polite"), ["Q: Where is the station?\\nA:"], max_new_tokens=20)  # doctest: +SKIP
    """
    given = answer_each(adapted, prompts, Decoding(**decoding), chat=chat, system=system, batch_size=batch_size)
    return [answer.text for answer in sorted(given)]


def answer_each(
    adapted: AdaptedModel,
    prompts: Sequence[Prompt],
    decoding: Decoding | None = None,
    *,
    chat: bool = False,
    system: str | None = None,
    batch_size: int = 8,
    beside_base: bool = False,
    wheres: Sequence[str] | None = None,
) -> Iterator[Answer]:
    """Yield answers as they are written, the shortest prompts' first.

    All prompts are checked before the first is answered. Greedy answers are those that each prompt gets alone; the
    beginning that all prompts share, such as a system message, is computed once where the model allows it.

    Args:
        adapted, prompts, chat, system, batch_size: as of `answers`.
        decoding: how; default greedy.
        beside_base: let the base answer too, from the same random numbers.
        wheres: where each prompt stands, for messages; default `"Prompt 3"`.

    Raises:
        PromptError: as `answers`.
        ValueError: there is no base beside a whole model; or an adapter cannot act where the answers are written.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    decoding = decoding or Decoding()
    if beside_base:
        with adapted.as_base():  # which says at once where there is none
            pass
    named = wheres or (
        ["The prompt"] if len(prompts) == 1 else [f"Prompt {number}" for number in range(1, len(prompts) + 1)]
    )
    rows = [encode(adapted, prompt, system, chat, where) for prompt, where in zip(prompts, named, strict=True)]
    ends = turn_ends(adapted, prompts, chat)
    # of one state of the model each: what they keep of the beginning that prompts share is that state's
    own, base = BatchWriter(adapted, decoding, ends), BatchWriter(adapted, decoding, ends) if beside_base else None
    return _answered(rows, own, base, batch_size)


def _answered(
    rows: Sequence[list[int]], own: BatchWriter, base: BatchWriter | None, batch_size: int
) -> Iterator[Answer]:
    rooms = [own.room(ids) for ids in rows]
    order = sorted(range(len(rows)), key=lambda number: (-rooms[number], len(rows[number]), number))
    turn = 0
    for room, group in groupby(order, key=rooms.__getitem__):
        numbers = list(group)
        for begin in range(0, len(numbers), batch_size):
            batch = numbers[begin : begin + batch_size]
            encoded = [rows[number] for number in batch]
            texts = own.write(encoded, room, turn)
            beside: Sequence[str | None] = [None] * len(batch)
            if base is not None:
                with base.adapted.as_base():
                    beside = base.write(encoded, room, turn)
            yield from map(Answer, batch, texts, beside)
            turn += 1


class BatchWriter:
    """Writes behind batches of prompts, for one state of the model.

    Args:
        adapted: the model, whose adapters stay as they are.
        decoding: how.
        ends: tokens that end a text beside the model's own.
    """

    def __init__(self, adapted: AdaptedModel, decoding: Decoding, ends: Sequence[int] = ()) -> None:
        self.adapted, self.decoding, self.ends = adapted, decoding, ends
        self._greedy: GreedyWriter | None = None
        if decoding.greedy and not adapted.is_encoder_decoder:
            self._greedy = GreedyWriter(adapted.model, adapted.tokenizer, ends)

    def room(self, ids: Sequence[int], where: str = "The prompt") -> int:
        """Return how many tokens are written behind a prompt at most; raise `PromptError` where there is no room."""
        room = room_behind(self.adapted, len(ids), where)
        return self.decoding.max_new_tokens if room is None else min(room, self.decoding.max_new_tokens)

    def write(self, rows: Sequence[list[int]], max_new_tokens: int, turn: int = 0) -> list[str]:
        """Return what the model writes behind some prompts; `turn` is added to the seed.

        Raises:
            ValueError: an adapter cannot act where the answers are written.
        """
        ids, mask = padded_left(rows, self.adapted)
        try:
            if self._greedy is not None:
                return self._greedy.write(ids, mask, max_new_tokens=max_new_tokens)
            return self._generate(ids, mask, max_new_tokens, turn)
        except PositionsError as error:
            raise ValueError(str(error)) from error

    def _generate(self, ids: Tensor, mask: Tensor, max_new_tokens: int, turn: int) -> list[str]:
        with self.decoding.applied(self.adapted, max_new_tokens, turn, self.ends) as ends:
            written = self.adapted.model.generate(input_ids=ids, attention_mask=mask)
        prompt = 1 if self.adapted.is_encoder_decoder else ids.shape[1]  # a decoder begins with a token of its own
        tokens = [until_end(row[prompt:].tolist(), ends) for row in written]
        return self.adapted.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def padded_left(rows: Sequence[list[int]], adapted: AdaptedModel) -> tuple[Tensor, Tensor]:
    """Return the tokens of some prompts and their mask, `[B, T]` each, padded on the left, on the model's device."""
    padding = (adapted.tokenizer.pad_token_id, adapted.tokenizer.eos_token_id, 0)
    pad = next(token for token in padding if token is not None)
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=adapted.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=adapted.device)
    return ids, mask


def until_end(tokens: list[int], ends: Sequence[int | None]) -> list[int]:
    """Return the tokens before the first that ends a text."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]
