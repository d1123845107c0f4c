"""Human judgements as batches, to train a judge on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft.data.batches import LengthGroupedSampler, as_dataset, padded, tokenizer_of
from lightning_peft.truthfulqa.judges.protocol import Judgement, judge_prompt, load_judgements, split_by_question
from lightning_peft.truthfulqa.prompts import encode_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class JudgeDataModule(L.LightningDataModule):
    """Judgements with their verdict as the answer: `Q: …`, `A: …`, `True:`, and then ` yes` or ` no`.

    Batches are dicts of tensors, padded on the right: `input_ids [B, T]`, `attention_mask [B, T]`, `labels [B, T]`
    (-100 outside the verdict). Training, validation and test questions are apart; see `split_by_question`. `test_rows`
    holds the rows held out for tests, for `judge_quality`; `lightning-peft judge` makes the same split.

    Args:
        path: `finetune_truth.jsonl` or `finetune_info.jsonl` of the TruthfulQA repository.
        test_fraction: share of the questions that training and validation never see.
        val_fraction: share of the questions for validation.
        seed: of the split, of `limit` and of the order.
        limit: train on only so many judgements, drawn with the seed.
        val_limit: validate on only so many.
        batch_size: rows of a batch.
        tokenizer: a tokenizer, or its name or folder; default the LightningModule's `tokenizer`.
        num_workers: of the data loaders.
    """

    def __init__(
        self,
        path: str,
        test_fraction: float = 0.2,
        val_fraction: float = 0.1,
        seed: int = 0,
        limit: int | None = None,
        val_limit: int | None = None,
        batch_size: int = 16,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.path, self.seed, self.batch_size, self.num_workers = path, seed, batch_size, num_workers
        self.test_fraction, self.val_fraction = test_fraction, val_fraction
        self.limit, self.val_limit = limit, val_limit
        self.tokenizer = tokenizer
        self.train_rows: list[Judgement] = []
        self.val_rows: list[Judgement] = []
        self.test_rows: list[Judgement] = []
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and split the judgements."""
        self._tokenizer = tokenizer_of(self, self.tokenizer)
        if self.train_rows:
            return
        train, val, self.test_rows = split_by_question(
            load_judgements(self.path), self.test_fraction, self.val_fraction, self.seed
        )
        self.train_rows, self.val_rows = draw(train, self.limit, self.seed), draw(val, self.val_limit, self.seed)

    def train_dataloader(self) -> DataLoader:
        rows = [self._encode(row) for row in self.train_rows]
        sampler = LengthGroupedSampler([len(row["input_ids"]) for row in rows], self.batch_size, self.seed)
        return self._loader(rows, sampler)

    def val_dataloader(self) -> DataLoader:
        return self._loader(sorted(map(self._encode, self.val_rows), key=lambda row: len(row["input_ids"])))

    def _loader(self, rows: list[dict[str, Tensor]], sampler: LengthGroupedSampler | None = None) -> DataLoader:
        return DataLoader(
            as_dataset(rows),
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=self._collate,
            num_workers=self.num_workers,
        )

    def _encode(self, row: Judgement) -> dict[str, Tensor]:
        assert self._tokenizer is not None
        prompt = judge_prompt(row.question, row.answer, row.kind)
        ids, start = encode_pair(self._tokenizer, prompt, " yes" if row.verdict else " no")
        labels = [-100] * start + ids[start:]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    def _collate(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        assert self._tokenizer is not None
        return padded(rows, self._tokenizer)


def draw(rows: Sequence[Judgement], limit: int | None, seed: int) -> list[Judgement]:
    """Draw `limit` of the rows with the seed, in their order; all where there is no limit or there are fewer."""
    if limit is None or limit >= len(rows):
        return list(rows)
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    drawn = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[i] for i in drawn]
