"""What laws are told by: their errors, and outputs held against each other."""

from __future__ import annotations

from torch import Tensor, equal


class LawBroken(AssertionError):
    """The error of an adaptation that does not obey a law."""


class DoesNotApply(Exception):
    """The error of a law that says nothing about this module; the message says why."""


def are_close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Return whether two tensors differ by at most a share of the largest value of the second."""
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def check_equal(a: Tensor, b: Tensor, tolerance: float, compared: str) -> None:
    """Raise `LawBroken` unless two tensors are equal: bit for bit at a tolerance of 0, see `are_close`."""
    if a.shape != b.shape:
        raise LawBroken(f"{compared} have shapes {tuple(a.shape)} and {tuple(b.shape)}.")
    if not (equal(a, b) if tolerance == 0 else are_close(a, b, tolerance)):
        distance = float((a - b).abs().max()) / (float(b.abs().max()) or 1.0)
        raise LawBroken(
            f"{compared} differ by {distance:.1e} of the largest value; {tolerance or 'bit-equality'} is asked."
        )


def check_different(a: Tensor, b: Tensor, compared: str) -> None:
    """Raise `LawBroken` where two tensors are the same, which should not be."""
    if are_close(a, b, 1e-4):
        raise LawBroken(f"{compared} are the same, so the law would hold of nothing.")
