"""Every row once an epoch, in an order that is shuffled, seeded, and spares padding."""

from __future__ import annotations

import torch

from lightning_peft.data.batches import LengthGroupedSampler

LENGTHS = torch.randint(5, 60, (203,), generator=torch.Generator().manual_seed(0)).tolist()


def padding(order: list[int], batch_size: int = 8) -> int:
    rows = [[LENGTHS[i] for i in order[b : b + batch_size]] for b in range(0, len(order), batch_size)]
    return sum(max(row) * len(row) - sum(row) for row in rows)


def test_every_row_once_in_another_order_each_epoch_and_the_same_for_a_seed_and_epoch() -> None:
    sampler = LengthGroupedSampler(LENGTHS, 8, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    resumed = LengthGroupedSampler(LENGTHS, 8, seed=1)
    resumed.set_epoch(1)
    assert list(resumed) == second, "a resumed run goes on as it would have"
    assert sorted(first) == sorted(second) == list(range(len(LENGTHS))) and first != second
    assert first == list(LengthGroupedSampler(LENGTHS, 8, seed=1)) and len(sampler) == 203


def test_there_is_less_than_a_third_of_the_padding_of_plain_shuffling() -> None:
    shuffled = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(1)).tolist()
    assert padding(list(LengthGroupedSampler(LENGTHS, 8, seed=1))) < padding(shuffled) / 3
