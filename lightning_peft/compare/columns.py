"""The columns of a comparison's table that are not measures: what a row has and what it took.

Terminal and page are made from this list. A new column is an entry here, or `register_column` with one of one's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_peft.compare.results import Results, Row
from lightning_peft.compare.writing import count, seconds, size

EVERYWHERE = ("terminal", "page")


@dataclass(frozen=True)
class Column:
    """A column beside the measures.

    Args:
        name: unlike any other column's.
        heading: with a line break where it may be broken.
        cell: returns what a row of `results.json` shows there, with line breaks where they help; an empty string where
            it has nothing. A column of which no row has anything is left out.
        where: the tables it is a part of, `"terminal"` and `"page"`.

    Example:
        >>> memory = Column("memory", "Memory", lambda row: size(row.get("peak_bytes")))
        >>> memory.cell({"peak_bytes": 1_780_000})
        '1.78 MB'
    """

    name: str
    heading: str
    cell: Callable[[Row], str]
    where: tuple[str, ...] = EVERYWHERE


def _parameters(row: Row) -> str:
    parts = [(row.get("trainable_parameters"), "trained"), (row.get("edited_parameters"), "edited")]
    return "\n".join(f"{count(number)}\n{kind}" for number, kind in parts if number) or "-"


def _step(row: Row) -> str:
    value = row.get("step_seconds")
    return f"{value:.3f}" if value else ""


COLUMNS = [
    Column("parameters", "Parameters", _parameters, ("terminal",)),  # two columns of the page, for want of room
    Column("trained", "Trained\nparameters", lambda row: count(row.get("trainable_parameters")), ("page",)),
    Column("edited", "Edited\nparameters", lambda row: count(row.get("edited_parameters")), ("page",)),
    Column("adapter", "Adapter", lambda row: size(row.get("adapter_bytes"))),
    Column("seconds", "Seconds", lambda row: seconds(row.get("seconds"))),
    Column("step", "Seconds\na step", _step, ("page",)),
    Column("peak_memory", "Memory", lambda row: size(row["peak_memory"]) if row.get("peak_memory") else ""),
]


def register_column(column: Column) -> Column:
    """Add a column to every table that is made from now on, to the right of the others.

    Raises:
        ValueError: there is another column of this name.
    """
    if any(column.name == other.name and column != other for other in COLUMNS):
        raise ValueError(f"There is a column {column.name!r} already: give yours another name.")
    if column not in COLUMNS:
        COLUMNS.append(column)
    return column


def shown_columns(results: Results, where: str) -> list[dict[str, Any]]:
    """Return heading and cells, one a row, of each column of a table that at least one row has something for."""
    columns = []
    for column in COLUMNS:
        if where in column.where and any(cells := [column.cell(row) for row in results["rows"]]):
            columns.append({"heading": column.heading, "cells": [cell or "-" for cell in cells]})
    return columns
