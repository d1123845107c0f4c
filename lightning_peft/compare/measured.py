"""Tables of what is measured beside the benchmark: a column for each measure, a row for each method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Measure:
    """A column of such a table.

    Args:
        label: its heading.
        meaning: what its numbers are.
        better: the sign of a change for the better, 1 or -1.
    """

    label: str
    meaning: str
    better: int = 1


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
                "cells": [_cell(row, name, measures[name].better) for name in names],
            }
            for row in shown
        ],
        "notes": notes,
    }


def measured_table(view: Mapping[str, Any]) -> Table:
    """Return the table for the terminal of what `measured_view` gave."""
    table = Table(
        title=Text(view["title"]),
        caption=Text("\n".join(["In brackets: difference to base, [95% interval]", *view["notes"]])),
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("Method", overflow="fold", min_width=16, max_width=26)
    for column in view["columns"]:
        table.add_column(column["label"], justify="right")
    for row in view["rows"]:
        cells = []
        for cell in row["cells"]:
            text = Text(cell["value"])
            if cell["interval"]:
                color = {"up": "green", "down": "red", "": ""}[cell["change"]]
                text.append(f" ({cell['difference']})\n{cell['interval']}", style=color)
            if cell["below"]:
                text.append(f"\n{cell['below']}")
            cells.append(text)
        table.add_row(Text(row["label"]), *cells)
    return table


def _cell(row: Mapping[str, Any], name: str, better: int) -> dict[str, str]:
    cell = {"value": "-", "difference": "", "interval": "", "change": "", "below": ""}
    value, difference = ((row.get(kind) or {}).get(name) for kind in ("metrics", "difference"))
    if value is not None:
        cell["value"] = f"{value['mean']:.3f}"
    if value is None or difference is None:
        return cell
    if difference["low"] > 0 or difference["high"] < 0:
        cell["change"] = "up" if difference["mean"] * better > 0 else "down"
    interval = f"[{difference['low']:+.3f}, {difference['high']:+.3f}]"
    return cell | {"difference": f"{difference['mean']:+.3f}", "interval": interval}
