"""The further tables of a comparison, each a section of `results.json`, and what they say a row costs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning_peft.compare.measured import measured_view
from lightning_peft.compare.results import Results, Row, check_results, completed, difference_to_base, read_measure
from lightning_peft.compare.writing import listed, score, with_interval

_PLACE = re.compile(r"\{([^{}:]+)(:\+)?\}")  # {name}: a value; {name:+}: its difference to base, with the interval


def section_views(results: Results) -> list[dict[str, Any]]:
    """Return what the terminal and the page show of each section, see `measured_view`; and its `unit`.

    A section of which no row has a value says so.

    Args:
        results: the content of `results.json`. Of `sections` each has `title` and `measures`, and may have `notes`,
            `below` (lines about values, by method and measure), `unit` (what differences are paired by, where it is
            not the comparison's) and `price` (see `prices`).
    """
    check_results(results)
    results = completed(results)
    return [_view(results, section) for section in results["sections"]]


def prices(results: Results, row: Row) -> list[str]:
    """Return what a row changes beside the task's measures, in a sentence for each section that has one.

    The section's `price` is the sentence, in which `{name:+}` stands for the row's difference to base in one of its
    measures, with the interval, and `{name}` for its value. It is left out where the row lacks one of these.

    Example:
        >>> section = {"title": "Cost", "measures": {"kl": {"better": -1}}, "price": "KL from base is {kl}."}
        >>> prices({"sections": [section]}, {"metrics": {"kl": {"mean": 0.5}}})
        ['KL from base is .500.']
    """
    sentences = (_filled(section, row) for section in results["sections"] if section.get("price"))
    return [sentence for sentence in sentences if sentence is not None]


def _view(results: Results, section: Mapping[str, Any]) -> dict[str, Any]:
    measures = {name: read_measure(name, entry) for name, entry in section["measures"].items()}
    title, notes = section.get("title") or section.get("name", ""), list(section.get("notes") or [])
    unit = section.get("unit") or results["unit"]
    view = measured_view(results, title, measures, notes)
    if view is None:
        labels = listed([measure.label for measure in measures.values()])
        nothing = f"No row has a value of {labels}." if labels else "It has no measures."
        return {"title": title, "columns": [], "rows": [], "notes": [nothing, *notes], "unit": unit}
    for row in view["rows"]:
        lines = (section.get("below") or {}).get(row["method"]) or {}
        for column, cell in zip(view["columns"], row["cells"], strict=True):
            cell["below"] = lines.get(column["name"], "")
    return {**view, "unit": unit}


def _filled(section: Mapping[str, Any], row: Row) -> str | None:
    """Return a section's price of a row; None where the row lacks one of its numbers."""
    missing = False

    def number(match: re.Match[str]) -> str:
        nonlocal missing
        name, change = match.group(1), match.group(2)
        value = difference_to_base(row, name) if change else (row.get("metrics") or {}).get(name)
        if value is None:
            missing = True
            return ""
        written = read_measure(name, section["measures"].get(name, {})).written
        return with_interval(value, written) if change else score(value["mean"], written)

    sentence = _PLACE.sub(number, section["price"])
    return None if missing else sentence
