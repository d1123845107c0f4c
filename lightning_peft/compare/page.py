"""A comparison as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from lightning_peft.compare.answers_view import answers_view
from lightning_peft.compare.effects import effects_view
from lightning_peft.compare.plots import INK, by_method, head_accuracy_map
from lightning_peft.compare.results import (
    METRICS,
    Results,
    Row,
    check_results,
    difference_to_base,
    direction,
    excludes_zero,
    holm_by_method,
    metrics_of,
    ranked_rows,
)
from lightning_peft.compare.verdict import verdict
from lightning_peft.compare.writing import count, indented, interval, minus, p_value, score, seconds, signed, size
from lightning_peft.files.records import write_atomically
from lightning_peft.truthfulqa.samples import SMALL, TASKS

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
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(score=score, signed=signed, interval=interval, p=p_value, minus=minus)
    return environment


def _view(results: Results) -> dict[str, Any]:
    """Return everything the template shows, so that it needs no arithmetic."""
    metrics, labels = metrics_of(results), {row["method"]: row["label"] for row in results["rows"]}
    heads = results.get("head_accuracy")
    return {
        "name": results["name"],
        "data": dict.fromkeys(("source", "label", "questions", "hash", "folds"), "unknown") | results["data"],
        "model": dict.fromkeys(("pretrained", "fingerprint", "layers", "heads"), "unknown") | results["model"],
        "model_size": count(results["model"].get("parameters")),
        "verdict": verdict(results),
        "metrics": {metric: METRICS[metric] for metric in metrics},
        "rows": [_row_view(row, metrics) for row in results["rows"]],
        "measured": [view for view in (effects_view(results), answers_view(results)) if view is not None],
        "contrasts": _contrasts_view(results, labels),
        "detectable": _detectable_view(results, metrics),
        "categories": _categories_view(results, labels),
        "chosen": [
            (row["label"], indented(row["chosen"], indent=None)) for row in results["rows"] if row.get("chosen")
        ],
        "heads": heads,
        "heads_picture": heads and _picture(lambda ink: head_accuracy_map(heads, ink=ink)),
        "methods_picture": _picture(lambda ink: by_method(results, ink=ink)) if ranked_rows(results) else None,
        "settings": indented(results.get("settings") or {}),
        "versions": results.get("versions") or {},
        "caveats": results.get("caveats") or [],
    }


def _row_view(row: Row, metrics: Iterable[str]) -> dict[str, Any]:
    cells = []
    for metric in metrics:
        difference = difference_to_base(row, metric)
        change = direction(difference) if difference is not None else ""
        cells.append({"score": (row.get("metrics") or {}).get(metric), "difference": difference, "change": change})
    return {
        "label": row["label"],
        "kind": row["kind"],
        "failed": row.get("failed"),
        "cells": cells,
        "trained": count(row.get("trainable_parameters")),
        "edited": count(row.get("edited_parameters")),
        "bytes": size(row.get("adapter_bytes")),
        "seconds": seconds(row.get("seconds")),
    }


def _contrasts_view(results: Results, labels: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            **contrast,
            "a": labels.get(contrast["a"], contrast["a"]),
            "b": labels.get(contrast["b"], contrast["b"]),
            "resolved": excludes_zero(contrast),
        }
        for contrast in results.get("contrasts") or []
    ]


def _detectable_view(results: Results, metrics: Iterable[str]) -> list[dict[str, Any]]:
    """Return the detectable difference and Holm-adjusted p-value of each metric, by method."""
    metrics = list(metrics)
    adjusted = {metric: holm_by_method(results, metric) for metric in metrics}
    rows = []
    for row in results["rows"]:
        differences = [difference_to_base(row, metric) for metric in metrics]
        if any(differences):
            cells = [
                {"mde": (difference or {}).get("mde"), "p": adjusted[metric].get(row["method"])}
                for metric, difference in zip(metrics, differences, strict=True)
            ]
            rows.append({"label": row["label"], "cells": cells})
    return rows


def _categories_view(results: Results, labels: Mapping[str, str]) -> dict[str, Any]:
    categories = results.get("categories") or {}
    methods = [method for method in labels if any(method in scores for scores in categories.values())]
    return {
        "methods": [labels[method] for method in methods],
        "small": SMALL,
        "rows": [
            {
                "name": name,
                "n": scores["n"],
                "small": scores["n"] < SMALL,
                "cells": [(scores.get(method) or {}).get(metric) for method in methods for metric in TASKS],
            }
            for name, scores in categories.items()
        ],
    }


def _picture(draw: Callable[[str], Figure]) -> dict[str, str]:
    """Return the figure as data URIs, drawn once for a light and once for a dark page."""
    return {"light": _data_uri(draw(INK)), "dark": _data_uri(draw(_INK_ON_DARK))}


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):  # element names from the content, not from chance
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
