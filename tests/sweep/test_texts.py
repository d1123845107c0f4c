"""A split's texts are read from the batches of the task's data, and from nothing else it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft.sweep.texts import read_split


class Batches:
    """Data of these batches."""

    def __init__(self, train: list[dict[str, Tensor]], test: list[dict[str, Tensor]]) -> None:
        self.train, self.test = train, test

    def train_dataloader(self) -> list[dict[str, Tensor]]:
        return self.train

    def test_dataloader(self) -> list[dict[str, Tensor]]:
        return self.test


def rows(group: list[int], **columns: list[int]) -> dict[str, Tensor]:
    ids = torch.arange(1, 1 + 3 * len(group)).reshape(len(group), 3)
    mask = torch.ones_like(ids)
    mask[0, 2] = 0
    named = {name: torch.tensor(values) for name, values in columns.items()}
    return {"input_ids": ids, "attention_mask": mask, "group": torch.tensor(group)} | named


def test_texts_are_kept_without_padding_and_once() -> None:
    train = rows([7, 8], label=[1, 0])
    data: Any = Batches([train, train], [rows([5, 5]), rows([3, 3])])
    texts = read_split(data)
    assert texts.labels == {(7, (1, 2)): 1, (8, (4, 5, 6)): 0} and texts.groups == 2
    assert [*texts.units] == [5, 3] and texts.demonstrations is None


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ([rows([1])], [], "has no 'label', it has input_ids, attention_mask, group: see ChoiceTask"),
        ([], [rows([1, 2])], r"must hold one unit's answers, but one has those of \[1, 2\]"),
        ([], [rows([1]), rows([1])], "The unit 1 comes in two test batches"),
        ([], [torch.ones(2)], "has no 'group', it has Tensor"),
    ],
)
def test_batches_that_are_not_as_a_choice_tasks_are_one_sentence(train: Any, test: Any, said: str) -> None:
    data: Any = Batches(train, test)
    with pytest.raises(ValueError, match=said):
        read_split(data)
