"""The content of `results.json`, and how it is read.

Table, page and pictures are made from it alone, so that a report can be made again without running anything. What its
numbers are, which of them ranks the rows and what a unit is called stand in it too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_peft.compare.statistics import holm
from lightning_peft.compare.writing import plural
from lightning_peft.moved.results import complete
from lightning_peft.tasks.measure import Measure

Results = Mapping[str, Any]
Row = Mapping[str, Any]

_ROUNDING = 1e-6
_LINE = (-math.inf, math.inf)
_ROW: dict[str, Any] = {"method": "", "kind": "", "metrics": {}, "difference": None, "failed": None}


@dataclass(frozen=True)
class Undescribed(Measure):
    """A measure of which the results hold numbers, but not which are the better ones: neither ranked nor coloured."""

    meaning: str = "not described in the results: neither ranked nor coloured"
    better: int = 0

    def __post_init__(self) -> None:
        """Allow `better` to be 0."""


def check_results(results: Results) -> None:
    """Raise `ValueError` in one sentence for what cannot be the content of a `results.json`."""
    if missing := [key for key in ("name", "data", "model", "rows") if results.get(key) is None]:
        raise ValueError(
            f"The results have no {', '.join(missing)}; expected the content of a results.json, but found the keys"
            f" {', '.join(map(str, results)) or '(none)'}."
        )
    described = [
        results.get("measures") or {},
        *(section.get("measures") or {} for section in results.get("sections") or []),
    ]
    for name, entry in (item for measures in described for item in measures.items()):
        try:
            format(0.5, entry.get("written") or "")
        except ValueError:
            raise ValueError(
                f"The measure {name!r} is written as {entry['written']!r}, which is no format of a number: use one such"
                f" as '.3f', or '' for three decimals without a leading zero."
            ) from None


def completed(results: Results) -> dict[str, Any]:
    """Return the results with what readers rely on: measures, which of them ranks, and a row's usual keys.

    A file of an earlier release says nothing of its measures; they are put in as they were then.
    """
    results = _without_none(results)
    if "measures" not in results:
        results = complete(results)
    primary = results.get("primary") or next(iter(results["measures"]), "")
    rows = [_ROW | {"label": row.get("method", "")} | _without_none(row) for row in results["rows"]]
    rows = [row | {"metrics": _values(row["metrics"]), "difference": _values(row["difference"])} for row in rows]
    sections = [{"measures": {}} | _without_none(section) for section in results.get("sections") or []]
    return {"unit": "unit", **results, "primary": primary, "rows": rows, "sections": sections}


def measures_of(results: Results) -> dict[str, Measure]:
    """Return the measures of the main table that at least one row has, by name.

    They come in the order of the results' `measures`, then any that nothing describes.
    """
    in_rows = {name: None for row in results["rows"] for name in row["metrics"]}
    elsewhere = {name for section in results["sections"] for name in section["measures"]}
    described = [name for name in results["measures"] if name in in_rows]
    undescribed = [name for name in in_rows if name not in elsewhere and name not in described]
    return {name: measure_named(results, name) for name in described + undescribed}


def measure_named(results: Results, name: str) -> Measure:
    """Return a measure of the main table or of a section; an `Undescribed` one where the results do not say."""
    for entries in [results["measures"], *(section["measures"] for section in results["sections"])]:
        if name in entries:
            return read_measure(name, entries[name])
    return Undescribed(name)


def read_measure(name: str, entry: Mapping[str, Any]) -> Measure:
    """Return the measure that an entry of `measures` describes."""
    values: dict[str, Any] = {key: entry[key] for key in ("meaning", "written") if entry.get(key)}
    values |= {"label": entry.get("label") or name, "range": tuple(entry.get("range") or (None, None))}
    if entry.get("better") not in (1, -1):
        return Undescribed(**values)
    return Measure(**{"meaning": "", "better": entry["better"], **values})


def units_of(results: Results) -> int | None:
    """Return how many units every row is tested on; None where the results do not say."""
    data = results["data"]
    return data.get("units", data.get("questions"))


def plural_unit(results: Results) -> str:
    """Return what units are called: the results' `units` where they say, else the regular plural of `unit`."""
    return results.get("units") or plural(results["unit"])


def are_means(results: Results) -> bool:
    """Return whether every value is a mean over units: of a function of all predictions no detectable difference is."""
    differences = [d for row in results["rows"] for d in (row["difference"] or {}).values()]
    return all(d.get("p") is None or d.get("mde") is not None for d in differences)


def ranked_rows(results: Results) -> list[Row]:
    """Return the rows that have a value of the primary measure, best first; none where nothing says what is better."""
    name = results["primary"]
    better = measure_named(results, name).better
    rows = [row for row in results["rows"] if not row["failed"] and _is_number(row["metrics"].get(name) or {})]
    return sorted(rows, key=lambda row: -better * row["metrics"][name]["mean"]) if better else []


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
    known = [(method, p) for method, p in family if p is not None and not math.isnan(p)]
    return dict(zip((method for method, _ in known), holm([p for _, p in known]), strict=True))


def excludes_zero(value: Mapping[str, Any]) -> bool:
    """Return whether an interval excludes 0."""
    low, high = value.get("low"), value.get("high")
    return low is not None and high is not None and bool(low > 0 or high < 0)


def direction(difference: Mapping[str, Any], better: int = 1) -> str:
    """Return ``"up"`` for the better or ``"down"`` for the worse where the difference is resolved, else nothing."""
    if not excludes_zero(difference) or difference["mean"] is None or not better:
        return ""
    return "up" if difference["mean"] * better > 0 else "down"


def outside_range(results: Results) -> Iterator[tuple[Row, Measure, float]]:
    """Yield each value that its measure cannot have."""
    for row in results["rows"]:
        for name, value in row["metrics"].items():
            measure = measure_named(results, name)
            low, high = (infinite if end is None else end for end, infinite in zip(measure.range, _LINE, strict=True))
            if _is_number(value) and not low - _ROUNDING <= value["mean"] <= high + _ROUNDING:
                yield row, measure, value["mean"]


def _is_number(value: Mapping[str, Any]) -> bool:
    return value.get("mean") is not None and math.isfinite(value["mean"])


def _values(values: Mapping[str, Any] | None) -> dict[str, dict[str, Any]] | None:
    """Return values by measure, each with a mean and the ends of its interval, None where these are missing."""
    if values is None:
        return None
    return {name: {"mean": None, "low": None, "high": None, **value} for name, value in _without_none(values).items()}


def _without_none(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value is not None}
