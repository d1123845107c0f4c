"""Other ways to score a unit's choices than by their log-probability, the model being left as it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from lightning_peft.models import Batch, CausalLM


class Scoring(ABC):
    """A way to score the choices of a test's units: the value of `CausalLM.scoring`."""

    chosen: Mapping[str, Any] = MappingProxyType({})  # what the last test chose on inner validation units

    @abstractmethod
    def __call__(self, module: CausalLM) -> Callable[[Batch], Tensor]:
        """Return the function that scores batches of choices, `[B]`, the higher the truer.

        It is asked for before the first choices of a test or validation.

        Args:
            module: under test by a Trainer with the task's data module, which is set up.
        """


@dataclass(frozen=True)
class Statements:
    """Texts whose truth is known, and those that are to be told: what a data module's `statements()` returns.

    Args:
        stored: token ids of each text that is learnt from, those of the inner training units first.
        truth: of each, 1 or 0.
        inner: how many are of inner training units; the others are of inner validation units.
        tested: token ids of each choice of the test units, in the form of `stored`, by `group` and `choice`.
        others: columns that only batches of other units have, whose numbers may be the same.
    """

    stored: Sequence[list[int]]
    truth: Sequence[int]
    inner: int
    tested: Mapping[tuple[int, int], list[int]]
    others: frozenset[str] = frozenset()
