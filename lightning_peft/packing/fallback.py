"""A faster way to compute is tried once against the plain way, on a little, before it is relied on."""

from __future__ import annotations

from collections.abc import Callable

# what models raise that are called in a way they were not written for
_REFUSALS = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


def objection(difference: Callable[[], float], allowed: float, unit: str) -> str:
    """What speaks against a faster way; empty where nothing does.

    Args:
        difference: goes both ways and gives how far apart they come out; NaN is too far.
        allowed: the largest difference that is rounding.
        unit: what a difference is measured in.

    Example:
        >>> objection(lambda: 1e-6, 1e-3, "nats"), objection(lambda: 0.5, 1e-3, "nats")
        ('', 'it differs by 5.0e-01 nats')
        >>> objection(lambda: [][0], 1e-3, "nats")
        'it raises IndexError'
    """
    try:
        found = difference()
    except _REFUSALS as error:
        return f"it raises {type(error).__name__}"
    return "" if found <= allowed else f"it differs by {found:.1e} {unit}"
