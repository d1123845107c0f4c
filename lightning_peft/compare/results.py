"""The content of `results.json`, and how it is read.

Table, page and pictures are made from it alone, so that a report can be made again without running anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_peft.compare.statistics import holm

METRICS = {
    "mc0": "of the best true and the best false answer, how often the true one is more likely; chance is .5",
    "mc1": "how often the best true answer is the most likely of all",
    "mc2": "probability of the true answers, as a share of that of all answers",
    "mc3": "share of the true answers that are more likely than every false one",
}

Results = Mapping[str, Any]
Row = Mapping[str, Any]


def check_results(results: Results) -> None:
    """Raise `ValueError` in one sentence for what cannot be the content of a `results.json`."""
    if missing := [key for key in ("name", "data", "model", "rows") if key not in results]:
        raise ValueError(
            f"The results have no {', '.join(missing)}; expected the content of a results.json, but found the keys"
            f" {', '.join(map(str, results)) or '(none)'}."
        )


def metrics_of(results: Results) -> list[str]:
    """Return the metrics that at least one row has, in the order of their numbers."""
    return [metric for metric in METRICS if any(metric in (row.get("metrics") or {}) for row in results["rows"])]


def ranked_rows(results: Results) -> list[Row]:
    """Return the rows that have an MC2 score, best first."""
    rows = [row for row in results["rows"] if not row.get("failed") and "mc2" in (row.get("metrics") or {})]
    return sorted(rows, key=lambda row: -row["metrics"]["mc2"]["mean"])


def difference_to_base(row: Row, metric: str) -> Mapping[str, Any] | None:
    """Return a row's paired difference to base: `mean`, `low`, `high`, `p`, `mde`; None where there is none."""
    return None if row.get("failed") else (row.get("difference") or {}).get(metric)


def contrast_of(results: Results, a: str, b: str, metric: str) -> dict[str, Any] | None:
    """Return the contrast ``a - b``, whichever way round it was stored."""
    for stored in results.get("contrasts") or []:
        if stored["metric"] != metric:
            continue
        if (stored["a"], stored["b"]) == (a, b):
            return dict(stored)
        if (stored["a"], stored["b"]) == (b, a):
            turned = {"a": a, "b": b, "mean": -stored["mean"], "low": -stored["high"], "high": -stored["low"]}
            return {**stored, **turned}
    return None


def holm_by_method(results: Results, metric: str) -> dict[str, float]:
    """Return Holm-adjusted p-values of "differs from base", over all methods of the comparison."""
    family = [(row["method"], (difference_to_base(row, metric) or {}).get("p")) for row in results["rows"]]
    known = [(method, p) for method, p in family if p is not None]
    return dict(zip((method for method, _ in known), holm([p for _, p in known]), strict=True))


def excludes_zero(value: Mapping[str, Any]) -> bool:
    """Return whether an interval excludes 0."""
    return bool(value["low"] > 0 or value["high"] < 0)


def direction(difference: Mapping[str, Any]) -> str:
    """Return ``"up"`` or ``"down"`` where the difference is resolved, else nothing."""
    if not excludes_zero(difference):
        return ""
    return "up" if difference["mean"] > 0 else "down"
