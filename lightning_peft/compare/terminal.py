"""A comparison as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from lightning_peft.compare.columns import shown_columns
from lightning_peft.compare.measured import COLORS, empty_table, split_evenly, stacked
from lightning_peft.compare.results import (
    Results,
    Row,
    are_means,
    check_results,
    completed,
    difference_to_base,
    direction,
    measures_of,
    plural_unit,
    units_of,
)
from lightning_peft.compare.writing import interval, listed, score, signed
from lightning_peft.tasks.measure import Measure

_MOST = 4  # measures side by side: 14 columns each, and the rest, are 120 in all where every column is full


def table(results: Results) -> Table:
    """Return the comparison as a table for the terminal, at most 120 columns wide.

    Each measure shows its mean, then the paired difference to base with its 95% interval. A failed row shows the
    sentence that says why. Of many measures some stand in further tables below. Printed to anything but a terminal it
    is plain text.

    Args:
        results: The content of ``results.json``.

    Returns:
        The table, for :meth:`rich.console.Console.print`.

    Raises:
        ValueError: ``results`` lacks a part that every ``results.json`` has.

    Examples:
        >>> import io
        >>> from rich.console import Console
        >>> results = {"name": "demo", "data": {"label": "Digits", "units": 8, "folds": 2}, "unit": "image",
        ...            "model": {"pretrained": "tiny"}, "measures": {"accuracy": {"label": "Accuracy", "better": 1}},
        ...            "rows": [{"method": "base", "label": "Base", "kind": "base", "seconds": 2.0,
        ...            "metrics": {"accuracy": {"mean": 0.25, "low": 0.0, "high": 0.5}}}]}
        >>> console = Console(width=100, file=io.StringIO())
        >>> console.print(table(results))
        >>> ".250" in console.file.getvalue()
        True
    """
    check_results(results)
    results = completed(results)
    measures = measures_of(results)
    parts = split_evenly(list(measures), _MOST)
    columns: list[list[dict[str, Any]]] = [shown_columns(results, "terminal"), *([] for _ in parts[1:])]
    tables = [
        _part(results["rows"], {name: measures[name] for name in names}, others)
        for names, others in zip(parts, columns, strict=True)
    ]
    tables[0].title, tables[-1].caption = Text(_title(results)), Text(_caption(results, measures))
    return stacked(tables)


def _part(rows: Sequence[Row], measures: Mapping[str, Measure], columns: Sequence[Mapping[str, Any]]) -> Table:
    shown = empty_table()
    for heading in [*(measure.label for measure in measures.values()), *(column["heading"] for column in columns)]:
        shown.add_column(Text(heading), overflow="fold", justify="right")
    for number, row in enumerate(rows):
        name = Text(row["label"])
        if row["failed"]:
            name.append(f"\nfailed: {row['failed']}", style="red")
        # Text, not str: rich would read "[+.060, +.137]" and a label with brackets as its markup.
        cells = [_cell(row, key, measure) for key, measure in measures.items()]
        shown.add_row(name, *cells, *(Text(column["cells"][number]) for column in columns))
    return shown


def _cell(row: Row, name: str, measure: Measure) -> Text:
    value, difference = row["metrics"].get(name), difference_to_base(row, name)
    if row["failed"] or value is None:
        return Text("-")
    cell = Text(score(value["mean"], measure.written))
    if difference is not None:
        change = f" ({signed(difference['mean'], measure.written)})\n{interval(difference, measure.written)}"
        cell.append(change, style=COLORS[direction(difference, measure.better)])
    return cell


def _title(results: Results) -> str:
    data, model, number = results["data"], results["model"], units_of(results)
    counts = [f"{number} {plural_unit(results)}"] if number is not None else []
    counts += [f"{data['folds']} folds"] if data.get("folds", 1) > 1 else []
    counts += [f"{len(results['seeds'])} seeds"] if "seeds" in results else []
    title = f"{results['name']}: {model.get('pretrained', 'model')} on {data.get('label', results['unit'])}"
    return f"{title} ({', '.join(counts)})" if counts else title


def _caption(results: Results, measures: Mapping[str, Measure]) -> str:
    value = "mean" if are_means(results) else "value"
    lines = [f"Below each {value}: difference to base, paired by {results['unit']}, [95% interval]"]
    lower = [measure.label for measure in measures.values() if measure.better < 0]
    return "\n".join([*lines, *([f"Lower is better: {listed(lower)}"] if lower else [])])
