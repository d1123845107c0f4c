"""A comparison as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from lightning_peft.compare.categories import categories_view
from lightning_peft.compare.columns import shown_columns
from lightning_peft.compare.plots import INK, by_method, drawn_measure, head_accuracy_map
from lightning_peft.compare.results import (
    Results,
    Row,
    are_means,
    check_results,
    completed,
    difference_to_base,
    direction,
    excludes_zero,
    holm_by_method,
    measure_named,
    measures_of,
    plural_unit,
    units_of,
)
from lightning_peft.compare.sections import section_views
from lightning_peft.compare.verdict import verdict
from lightning_peft.compare.writing import count, indented, initial, interval, listed, minus, p_value, score, signed
from lightning_peft.files.records import write_atomically
from lightning_peft.tasks.measure import Measure

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_INK_ON_DARK = "#d8dce4"


def write_html(results: Results, path: str | os.PathLike[str]) -> Path:
    """Write the comparison as one HTML file that needs nothing else: no script, no link, pictures inside.

    The file is written under a temporary name and renamed, so a reader never sees half a page. The same results give
    the same bytes.

    Args:
        results: The content of ``results.json``.
        path: Where to write; missing folders are made and an existing file is replaced.

    Returns:
        The path written.

    Raises:
        ValueError: ``results`` lacks a part that every ``results.json`` has.

    Examples:
        >>> import json
        >>> write_html(json.loads(Path("results.json").read_text()), "report.html")  # doctest: +SKIP
        PosixPath('report.html')
    """
    check_results(results)
    html = _environment().from_string(_TEMPLATE.read_text(encoding="utf-8")).render(_view(results))
    target = Path(path)
    write_atomically(target, html)
    return target


def _environment() -> Environment:
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
    environment = Environment(autoescape=True, undefined=StrictUndefined, **options)
    environment.filters.update(score=score, signed=signed, interval=interval, p=p_value, minus=minus, initial=initial)
    return environment


def _view(results: Results) -> dict[str, Any]:
    """Return everything the template shows, so that it needs no arithmetic."""
    results = completed(results)
    measures, labels = measures_of(results), {row["method"]: row["label"] for row in results["rows"]}
    heads, drawn = results.get("head_accuracy"), drawn_measure(results)
    return {
        "name": results["name"],
        "data": dict.fromkeys(("source", "label", "hash", "folds")) | results["data"],
        "units": units_of(results),
        "unit": results["unit"],
        "label": results.get("label", "truth"),
        "plural": plural_unit(results),
        "model": dict.fromkeys(("pretrained", "fingerprint", "layers", "heads")) | results["model"],
        "model_size": count(results["model"].get("parameters")),
        "verdict": verdict(results),
        "value": "mean" if are_means(results) else "value",
        "measures": list(measures.values()),
        "lower": listed([measure.label for measure in measures.values() if measure.better < 0]),
        "columns": [column | {"heading": column["heading"].split("\n")} for column in shown_columns(results, "page")],
        "rows": [_row_view(row, measures) for row in results["rows"]],
        "sections": section_views(results),
        "contrasts": _contrasts_view(results, labels),
        "detectable": _detectable_view(results, measures),
        "categories": categories_view(results),
        "chosen": [
            (row["label"], indented(row["chosen"], indent=None)) for row in results["rows"] if row.get("chosen")
        ],
        "heads": heads,
        "heads_picture": heads and _picture(lambda ink: head_accuracy_map(heads, ink=ink)),
        "drawn": measure_named(results, drawn).label if drawn is not None else None,
        "methods_picture": _picture(lambda ink: by_method(results, drawn, ink=ink)) if drawn is not None else None,
        "settings": indented(results.get("settings") or {}),
        "versions": results.get("versions") or {},
        "caveats": results.get("caveats") or [],
    }


def _row_view(row: Row, measures: Mapping[str, Measure]) -> dict[str, Any]:
    cells = []
    for name, measure in measures.items():
        difference = difference_to_base(row, name)
        change = direction(difference, measure.better) if difference is not None else ""
        cell = {"score": row["metrics"].get(name), "difference": difference, "change": change}
        cells.append(cell | {"written": measure.written})
    return {"label": row["label"], "kind": row["kind"], "failed": row["failed"], "cells": cells}


def _contrasts_view(results: Results, labels: Mapping[str, str]) -> list[dict[str, Any]]:
    views = []
    for contrast in results.get("contrasts") or []:
        measure = measure_named(results, contrast["metric"])
        names = {side: labels.get(contrast[side], contrast[side]) for side in ("a", "b")}
        more = {"label": measure.label, "written": measure.written, "resolved": excludes_zero(contrast)}
        views.append({"p": None, **contrast, **names, **more})
    return views


def _detectable_view(results: Results, measures: Mapping[str, Measure]) -> list[dict[str, Any]]:
    """Return the detectable difference and Holm-adjusted p-value of each measure, by method."""
    adjusted = {name: holm_by_method(results, name) for name in measures}
    rows = []
    for row in results["rows"]:
        cells = []
        for name, measure in measures.items():
            mde, p = (difference_to_base(row, name) or {}).get("mde"), adjusted[name].get(row["method"])
            cells.append({"mde": mde, "p": p, "written": measure.written})
        if any(difference_to_base(row, name) for name in measures):
            rows.append({"label": row["label"], "cells": cells})
    return rows


def _picture(draw: Callable[[str], Figure]) -> dict[str, str]:
    """Return the figure as data URIs, drawn once for a light and once for a dark page."""
    return {"light": _data_uri(draw(INK)), "dark": _data_uri(draw(_INK_ON_DARK))}


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):  # element names from the content, not from chance
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
