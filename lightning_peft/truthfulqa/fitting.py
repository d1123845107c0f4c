"""Fewer demonstrations, where all of them with a question would be longer than the model can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BREAK = "\n\n"  # between demonstrations
_LONGEST = 32  # texts that are tried with every number of demonstrations


def fewer_demonstrations(
    primer: str, texts: Sequence[tuple[str, str]], length: Callable[[str, str, str], int], window: float
) -> tuple[str, int, int]:
    """Leave out demonstrations from the front of a primer until no text is longer than the window.

    Args:
        primer: demonstrations, a blank line between two.
        texts: a question and its answer each.
        length: of a text in tokens, given a primer, the question and the answer.
        window: how many tokens the model can read.

    Returns:
        The rest of the primer, the number of its demonstrations, and the number there were. Where a question is too
        long by itself, none is left.

    Example:
        >>> fewer_demonstrations("a\\n\\nbb\\n\\nccc", [("q", "a")], lambda *parts: sum(map(len, parts)), 10)
        ('bb\\n\\nccc', 2, 3)
    """
    shots = primer.split(_BREAK) if primer else []
    longest = sorted(texts, key=lambda text: -length("", *text))[:_LONGEST]

    def fits(count: int) -> bool:
        shown = _BREAK.join(shots[len(shots) - count :])
        return all(length(shown, *text) <= window for text in longest)

    fewest, most = 0, len(shots)
    while fewest < most:
        middle = (fewest + most + 1) // 2
        fewest, most = (middle, most) if fits(middle) else (fewest, middle - 1)
    return _BREAK.join(shots[len(shots) - fewest :]), fewest, len(shots)
