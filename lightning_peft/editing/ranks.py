"""This process among those that compute together, and what all of them hold."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

T = TypeVar("T")


def rank_and_count() -> tuple[int, int]:
    """Return the number of this process and how many there are; 0 and 1 where `torch.distributed` does not run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def of_all_ranks(value: T) -> list[T]:
    """Return what each process gives, in the order of their numbers; every process must take part."""
    count = rank_and_count()[1]
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    torch.distributed.all_gather_object(values, value)
    return values
