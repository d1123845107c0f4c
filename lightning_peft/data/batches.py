"""Rows as batches, and which rows and batches follow each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_POOL = 8  # batches whose rows are sorted together: enough to be alike, few enough to stay shuffled


T = TypeVar("T")


def evenly_mixed(*kinds: Sequence[T]) -> list[T]:
    """Mix all batches of all kinds, each kind evenly spread, so that the first ones are of every kind.

    Example:
        >>> evenly_mixed("aaaa", "bb", "")
        ['a', 'b', 'a', 'a', 'b', 'a']
    """
    placed = [(i / len(batches), kind, batch) for kind, batches in enumerate(kinds) for i, batch in enumerate(batches)]
    return [batch for *_, batch in sorted(placed, key=lambda entry: entry[:2])]


def padded(rows: Sequence[Mapping[str, object]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Put rows into one batch, padded on the right: `input_ids`, `attention_mask` and any `labels`, `[B, T]`.

    Args:
        rows: with `input_ids`, and all or none with `labels` of the same length.
        tokenizer: says what to pad ids with; labels are padded with -100.
    """
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=0 if pad is None else pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }
    if "labels" in rows[0]:
        labels = [torch.as_tensor(row["labels"]) for row in rows]
        batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
    return batch


def tokenizer_of(data: L.LightningDataModule, given: PreTrainedTokenizerBase | str | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer that was given, by itself or by its name, or else that of the LightningModule.

    Raises:
        ValueError: neither has one.
    """
    if isinstance(given, str):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(given)
    if given is None:
        given = getattr(getattr(data.trainer, "lightning_module", None), "tokenizer", None)
    if given is None:
        raise ValueError("The data module needs a tokenizer: give one, or a LightningModule that has one.")
    return given


def as_dataset(rows: Sequence[T]) -> Dataset[T]:
    """Return the rows as they are: a DataLoader reads any sequence, but is declared to take a `Dataset` alone."""
    return cast("Dataset[T]", rows)


class LengthGroupedSampler(Sampler[int]):
    """Row numbers in an order in which each run of `batch_size` rows is of like length.

    The order depends on the seed and the epoch alone, so a resumed run goes on as it would have; Lightning calls
    `set_epoch`.

    Args:
        lengths: the length of each row, in tokens.
        batch_size: the loader's.
        seed: of the order.

    Example:
        >>> sorted(LengthGroupedSampler([5, 1, 4, 2], batch_size=2, seed=0))
        [0, 1, 2, 3]
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch's order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = _POOL * self.batch_size
        for begin in range(0, len(order), pool):
            rows = sorted(order[begin : begin + pool], key=self.lengths.__getitem__)
            batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            # the short batch stays last, or the loader would cut all that follow it elsewhere
            whole = len(batches) - (len(batches[-1]) < self.batch_size)
            for i in [*torch.randperm(whole, generator=generator).tolist(), *range(whole, len(batches))]:
                yield from batches[i]
