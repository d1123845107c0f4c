"""How texts are written: how long, how freely."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft.packing.generation import settings_of_generation

if TYPE_CHECKING:
    from lightning_peft.generation.adapted import AdaptedModel


@dataclass(frozen=True)
class Decoding:
    """The settings by which tokens are chosen; those of the model's own `generation_config` do not count.

    Args:
        max_new_tokens: of an answer, at most; fewer where the model's window ends.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn from the distribution at this
            temperature.
        top_p: tokens are drawn from the likeliest that have this probability together; 1 leaves none out.
        seed: of the draws. Rows of a batch are drawn together, so that an answer depends on the batch it is in.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> Decoding(temperature=-1)
        Traceback (most recent call last):
        ValueError: temperature must be 0 (the likeliest token) or a positive number, got -1.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature must be 0 (the likeliest token) or a positive number, got {self.temperature}."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}.")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature == 0

    @contextmanager
    def applied(
        self, adapted: AdaptedModel, max_new_tokens: int, turn: int = 0, ends: Sequence[int] = ()
    ) -> Iterator[list[int]]:
        """Let `generate` of the model write so; afterwards the random numbers of others go on as they would have.

        Args:
            adapted: the model.
            max_new_tokens: in place of these settings', where the window leaves fewer.
            turn: added to the seed.
            ends: tokens that end a text beside the model's own.

        Yields:
            The tokens that end a text.
        """
        sampling: dict[str, Any] = {}
        if not self.greedy:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        device = adapted.device
        with (
            settings_of_generation(adapted.model, adapted.tokenizer, max_new_tokens, ends, **sampling) as all_ends,
            torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=not self.greedy),
        ):
            if not self.greedy:
                torch.manual_seed(self.seed + turn)
            yield all_ends
