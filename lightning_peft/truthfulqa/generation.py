"""The benchmark's questions as prompts, and greedy answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.packing.generation import GreedyWriter
from lightning_peft.truthfulqa.presets import Ending, Prompting, cut_answer, is_finished

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_peft.truthfulqa.questions import Question


class Answer(NamedTuple):
    """A model's answer (a tuple: Lightning moves what `predict_step` returns, and refuses frozen dataclasses).

    Args:
        question_id: as in the release.
        text: the answer as it is judged.
        raw: all that the model wrote.
    """

    question_id: int
    text: str
    raw: str


def encode_prompts(
    questions: Sequence[Question], prompting: Prompting, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> list[dict[str, Any]]:
    """Encode prompts in batches of like length, padded on the left: the shortest first, whatever the questions' order.

    Returns:
        Dicts with `input_ids [B, T]`, `attention_mask [B, T]`, `group [B]` (the question's id), `prompt_end [B]` (the
        position id of the last prompt token), and `ending` and `max_new_tokens` of the prompting.
    """
    rows = sorted(
        ((prompting.encode(tokenizer, q.text), q.id) for q in questions), key=lambda row: (len(row[0]), row[1])
    )
    padding = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(token for token in padding if token is not None)
    batches: list[dict[str, Any]] = []
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        width = len(part[-1][0])
        batches.append(
            {
                "input_ids": torch.tensor([[pad] * (width - len(ids)) + ids for ids, _ in part]),
                "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in part]),
                "group": torch.tensor([number for _, number in part]),
                "prompt_end": torch.tensor([len(ids) - 1 for ids, _ in part]),
                "ending": prompting.ending,
                "max_new_tokens": prompting.max_new_tokens,
            }
        )
    return batches


class AnswerGenerator:
    """Answers batches of prompts greedily, for one state of a model, as `lightning_peft.packing.generation` writes.

    Make a new generator whenever the model or its adapters change.

    Args:
        backbone: a causal language model of transformers. Whatever adapters are active count.
        tokenizer: the model's.
    """

    def __init__(self, backbone: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.backbone, self.tokenizer = backbone, tokenizer
        self._writer = GreedyWriter(backbone, tokenizer)

    def answer(self, batch: dict[str, Any]) -> list[Answer]:
        """Answer one batch of `encode_prompts`."""
        ending: Ending = batch["ending"]
        texts = self.write(batch["input_ids"], batch["attention_mask"], ending, batch["max_new_tokens"])
        return [
            Answer(number, cut_answer(text, ending), text)
            for number, text in zip(batch["group"].tolist(), texts, strict=True)
        ]

    def write(
        self, input_ids: Tensor, attention_mask: Tensor, ending: Ending = "paragraph", max_new_tokens: int = 50
    ) -> list[str]:
        """Return what the model writes after each prompt.

        Args:
            input_ids: `[B, T]`, padded on the left.
            attention_mask: `[B, T]`.
            ending: where an answer ends, and writing stops.
            max_new_tokens: where it stops at the latest.

        Raises:
            ContextWindowError: a prompt and an answer of that length are longer than the model can read.
        """
        return self._writer.write(input_ids, attention_mask, partial(is_finished, ending=ending), max_new_tokens)
