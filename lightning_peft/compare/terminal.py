"""A comparison as a table for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_peft.compare.results import Results, Row, check_results, difference_to_base, direction, metrics_of
from lightning_peft.compare.writing import count, interval, score, seconds, signed, size


def table(results: Results) -> Table:
    """Return the comparison as a table for the terminal, at most 120 columns wide.

    Each metric shows its mean, then the paired difference to base with its 95% interval. A failed row shows the
    sentence that says why. Printed to anything but a terminal it is plain text.

    Args:
        results: The content of ``results.json``.

    Returns:
        The table, for :meth:`rich.console.Console.print`.

    Raises:
        ValueError: ``results`` lacks a part that every ``results.json`` has.

    Examples:
        >>> import io
        >>> from rich.console import Console
        >>> results = {"name": "demo", "data": {"label": "Demo questions", "questions": 8, "folds": 2},
        ...            "model": {"pretrained": "tiny"}, "rows": [{"method": "base", "label": "Base", "kind": "base",
        ...            "metrics": {"mc1": {"mean": 0.25, "low": 0.0, "high": 0.5}}, "difference": None,
        ...            "trainable_parameters": 0, "edited_parameters": 0, "adapter_bytes": 0, "seconds": 2.0,
        ...            "failed": None}]}
        >>> console = Console(width=100, file=io.StringIO())
        >>> console.print(table(results))
        >>> ".250" in console.file.getvalue()
        True
    """
    check_results(results)
    data, metrics = results["data"], metrics_of(results)
    shown = Table(
        title=Text(
            f"{results['name']}: {results['model']['pretrained']} on {data['label']}"
            f" ({data['questions']} questions, {data['folds']} folds)"
        ),
        caption=Text("Below each mean: difference to base, paired by question, [95% interval]"),
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    # Four metrics of 14 columns each, and the rest: 120 in all where every column is full.
    shown.add_column("Method", overflow="fold", min_width=16, max_width=26)
    for metric in metrics:
        shown.add_column(metric.upper(), overflow="fold", justify="right")
    shown.add_column("Parameters", overflow="fold", justify="right")
    shown.add_column("Adapter", overflow="fold", justify="right")
    shown.add_column("Seconds", overflow="fold", justify="right")
    for row in results["rows"]:
        name = Text(row["label"])
        if row.get("failed"):
            name.append(f"\nfailed: {row['failed']}", style="red")
        # Text, not str: rich would read "[+.060, +.137]" and a label with brackets as its markup.
        shown.add_row(
            name,
            *(_terminal_cell(row, metric) for metric in metrics),
            Text(_parameters(row)),
            Text(size(row.get("adapter_bytes"))),
            Text(seconds(row.get("seconds"))),
        )
    return shown


def _terminal_cell(row: Row, metric: str) -> Text:
    value, difference = (row.get("metrics") or {}).get(metric), difference_to_base(row, metric)
    if row.get("failed") or value is None:
        return Text("-")
    cell = Text(score(value["mean"]))
    if difference is not None:
        color = {"up": "green", "down": "red", "": ""}[direction(difference)]
        cell.append(f" ({signed(difference['mean'])})\n{interval(difference)}", style=color)
    return cell


def _parameters(row: Row) -> str:
    parts = [(row.get("trainable_parameters"), "trained"), (row.get("edited_parameters"), "edited")]
    return "\n".join(f"{count(number)}\n{kind}" for number, kind in parts if number) or "-"
