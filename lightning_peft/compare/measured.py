"""Tables of what is measured beside a task's own measures: a column for each measure, a row for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_peft.compare.results import direction
from lightning_peft.compare.writing import interval, score, signed
from lightning_peft.tasks.measure import Measure as Measure

COLORS = {"up": "green", "down": "red", "": ""}
_MOST = 5  # measures side by side: 18 columns each, and 26 for the method
T = TypeVar("T")


def measured_view(
    results: Mapping[str, Any], title: str, measures: Mapping[str, Measure], notes: list[str]
) -> dict[str, Any] | None:
    """Return what the terminal and the page show of these measures; None where no row has any.

    Args:
        results: the content of `results.json`.
        title: of the table.
        measures: by their names among a row's `metrics`.
        notes: what to say below.

    Returns:
        `title`; `columns`, label and meaning of each; `rows`, each with its `method`, `label` and `cells` (`value`,
        `difference`, `interval` and `change`: `"up"` for the better, `"down"` for the worse, nothing where the interval
        includes 0; and `below`, a line about the value, for whoever has one); `notes`.
    """
    rows = [row for row in results["rows"] if not row.get("failed")]
    names = [name for name in measures if any(name in (row.get("metrics") or {}) for row in rows)]
    shown = [row for row in rows if any(name in (row.get("metrics") or {}) for name in names)]
    if not shown:
        return None
    return {
        "title": title,
        "columns": [{"name": name, "label": measures[name].label, "meaning": measures[name].meaning} for name in names],
        "rows": [
            {
                "method": row["method"],
                "label": row["label"],
                "cells": [_cell(row, name, measures[name]) for name in names],
            }
            for row in shown
        ],
        "notes": notes,
    }


def measured_table(view: Mapping[str, Any]) -> Table:
    """Return the table for the terminal of what `measured_view` gave; many measures stand in parts below each other."""
    if not view["rows"]:
        table = Table(title=Text(view["title"]), box=None, show_header=False)
        for note in view["notes"]:
            table.add_row(Text(note))
        return table
    columns = list(range(len(view["columns"])))
    parts = [_part(view, part) for part in split_evenly(columns, _MOST)]
    parts[0].title = Text(view["title"])
    parts[-1].caption = Text("\n".join(["In brackets: difference to base, [95% interval]", *view["notes"]]))
    return stacked(parts)


def stacked(parts: Sequence[Table]) -> Table:
    """Return tables one below another, as one."""
    if len(parts) == 1:
        return parts[0]
    whole = Table.grid()
    for part in parts:
        whole.add_row(part)
    return whole


def split_evenly(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """Return the items in as few parts as hold at most so many each, all but equally long; one where there are none.

    Example:
        >>> split_evenly("abcdefg", 3)
        ['abc', 'de', 'fg']
    """
    number = max(1, -(-len(items) // most))
    size, more = divmod(len(items), number)
    starts = [i * size + min(i, more) for i in range(number + 1)]
    return [items[begin:end] for begin, end in pairwise(starts)]


def empty_table() -> Table:
    """Return a table with the column of the methods."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("Method", overflow="fold", min_width=16, max_width=26)
    return table


def _part(view: Mapping[str, Any], columns: Sequence[int]) -> Table:
    table = empty_table()
    for column in columns:
        table.add_column(view["columns"][column]["label"], justify="right")
    for row in view["rows"]:
        cells = []
        for cell in (row["cells"][column] for column in columns):
            text = Text(cell["value"])
            if cell["interval"]:
                text.append(f" ({cell['difference']})\n{cell['interval']}", style=COLORS[cell["change"]])
            if cell["below"]:
                text.append(f"\n{cell['below']}")
            cells.append(text)
        table.add_row(Text(row["label"]), *cells)
    return table


def _cell(row: Mapping[str, Any], name: str, measure: Measure) -> dict[str, str]:
    cell = {"value": "-", "difference": "", "interval": "", "change": "", "below": ""}
    value, difference = ((row.get(kind) or {}).get(name) for kind in ("metrics", "difference"))
    if value is not None:
        cell["value"] = score(value["mean"], measure.written)
    if value is None or difference is None:
        return cell
    return cell | {
        "difference": signed(difference["mean"], measure.written),
        "interval": interval(difference, measure.written),
        "change": direction(difference, measure.better),
    }
