"""Tasks whose units are choices among answers, by their log-probabilities."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor

from lightning_peft.tasks.task import Task


class ChoiceTask(Task):
    """A task of a causal language model in which a unit is a prompt with answers to it, some right and some wrong.

    `data(split, units_per_batch=1)` then tests one unit a batch: `input_ids`, `attention_mask`, `labels [C, T]` (-100
    outside the answer), `group [C]`, the unit's number, and columns that say what each answer is. And
    `data(split, edits=True)` trains on labelled texts: `input_ids`, `attention_mask [B, T]`, `label [B]` in {0, 1},
    `group [B]`. So ways of scoring choices otherwise, and edits of many strengths at a time, can be put to it.
    """

    @abstractmethod
    def choice_scores(self, logprobs: Tensor, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Return one unit's score by each measure that it has choices for.

        Args:
            logprobs: `[C]`, of its answers, in nats.
            batch: the unit's.
        """
