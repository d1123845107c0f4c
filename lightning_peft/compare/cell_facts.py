"""What is known of every finished cell beside its scores, and what a row's cells make of it together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CellFact:
    """A number in a cell's `result.json`, and in its row's entry in `results.json`.

    Args:
        name: under which `run_cell` returns it.
        kind: `int` or `float`.
        together: what the numbers of a row's cells make, such as their sum.
        later: whether cells of an earlier release lack it; they count as finished all the same.
    """

    name: str
    kind: type[int] | type[float]
    together: Callable[[Iterable[float]], float]
    later: bool = False


def _mean(values: Iterable[float]) -> float:
    return statistics.mean(values)


CELL_FACTS = (
    CellFact("trainable_parameters", int, max),
    CellFact("edited_parameters", int, max),
    CellFact("adapter_bytes", int, max),
    CellFact("seconds", float, sum),
    CellFact("scoring_seconds", float, sum),
    CellFact("step_seconds", float, _mean, later=True),
    CellFact("peak_memory", int, max, later=True),
)


def unknown_facts() -> dict[str, float]:
    """Return the facts of a cell that has failed: 0 each."""
    return {fact.name: fact.kind() for fact in CELL_FACTS}


def row_facts(cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the facts of a row, by name, as far as its cells' results have them.

    Example:
        >>> cell = {"trainable_parameters": 8, "edited_parameters": 0, "adapter_bytes": 32, "seconds": 1.5}
        >>> row_facts([cell, cell])
        {'trainable_parameters': 8, 'edited_parameters': 0, 'adapter_bytes': 32, 'seconds': 3.0}
    """
    known = {fact: [cell[fact.name] for cell in cells if fact.name in cell] for fact in CELL_FACTS}
    return {fact.name: fact.together(values) for fact, values in known.items() if values}
