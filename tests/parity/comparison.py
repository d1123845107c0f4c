"""One row of the parity table: a method here, a peer's implementation of it, one architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """How far ours is from the peer's numbers.

    Args:
        outputs: largest absolute difference of logits (or of what the peer computes: vectors, masks, weights) divided
            by the largest absolute value of the peer's.
        gradients: the same of the gradients of the trained parameters; None where nothing is trained.
        parameters: numbers of trained parameters, ours and the peer's; None where nothing is trained.
    """

    outputs: float
    gradients: float | None = None
    parameters: tuple[int, int] | None = None


@dataclass(frozen=True)
class Comparison:
    """A method of ours beside a peer's.

    Args:
        method: the callback or function here, with the arguments that make it the peer's.
        peer: the peer's name and version, and its name for the method.
        architecture: a model type, or what else it is computed on.
        difference: computes ours and compares it with the stored numbers of the peer.
        outputs: the largest allowed difference of outputs, relative.
        gradients: the largest allowed difference of gradients, relative.
        note: what differs by design, in one short sentence; empty where nothing does.
    """

    method: str
    peer: str
    architecture: str
    difference: Callable[[], Difference]
    outputs: float = 1e-6
    gradients: float = 1e-5
    note: str = ""

    def __str__(self) -> str:
        return f"{self.method} {self.peer} {self.architecture}"


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference, divided by the peer's largest absolute value."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
