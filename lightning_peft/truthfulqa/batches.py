"""Which rows and which batches follow each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch.utils.data import Sampler

_POOL = 8  # batches whose rows are sorted together: enough to be alike, few enough to stay shuffled


T = TypeVar("T")


def evenly_mixed(*kinds: Sequence[T]) -> list[T]:
    """All batches of all kinds, those of each kind evenly spread, so that the first ones are of every kind.

    Example:
        >>> evenly_mixed("aaaa", "bb", "")
        ['a', 'b', 'a', 'a', 'b', 'a']
    """
    placed = [(i / len(batches), kind, batch) for kind, batches in enumerate(kinds) for i, batch in enumerate(batches)]
    return [batch for *_, batch in sorted(placed, key=lambda entry: entry[:2])]


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
