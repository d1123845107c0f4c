"""The results of finished cells, put together: scores by unit, intervals, differences, what the report needs."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_peft import __version__
from lightning_peft.compare import statistics
from lightning_peft.compare.plan import Plan, Row
from lightning_peft.compare.statistics import Interval, mean_interval, minimal_detectable, paired_difference
from lightning_peft.editing.intervals import wilson
from lightning_peft.tasks.cell import Cell
from lightning_peft.tasks.cell_records import Scores
from lightning_peft.tasks.measure import Measure
from lightning_peft.tasks.section import Section

_PACKAGES = ("torch", "lightning", "transformers", "peft", "torchmetrics", "scikit-learn")


def collect(
    plan: Plan,
    settings: Mapping[str, Any],
    cells: Mapping[tuple[str, int], Cell],
    sections: Sequence[Section],
    output: Path,
) -> dict[str, Any]:
    """Put finished cells together into the content of `results.json`.

    Args:
        plan: the plan.
        settings: the plan as it was written.
        cells: by row and fold, with their results.
        sections: the task's, prepared.
        output: the comparison's folder.
    """
    task, records = plan.task, plan.task.records
    base = next(row.name for row in plan.rows if row.kind == "base")
    folds = {row.name: [cells[row.name, fold] for fold in range(task.folds)] for row in plan.rows}
    whole = {name: not any(cell.failed for cell in row) for name, row in folds.items()}
    scores: dict[str, Scores] = {name: records.scores(row) if whole[name] else {} for name, row in folds.items()}
    measures = dict(task.measures)
    for section in sections:
        measures |= section.measures
        for name, row in folds.items():
            if whole[name]:
                scores[name] |= _once(section.scores(row, folds[base] if whole[base] else ()))
    units = len(
        {unit for row in folds.values() for cell in row if not cell.failed for unit in records.units(cell.result)}
    )
    rows = [_row(row, folds[row.name], measures, scores, base) for row in plan.rows]
    for section in sections:
        for entry in rows:
            entry |= section.row_results(folds[entry["method"]])
    results = {
        "name": plan.name,
        "data": records.describe_data(units),
        "model": records.describe_model(),
        "measures": {name: measure.as_dict() for name, measure in task.measures.items()},
        "primary": task.primary,
        "unit": task.unit,
        "rows": rows,
        "contrasts": _contrasts(plan, scores),
        "categories": _categories(plan, list(cells.values()), scores),
        "category_measures": list(records.category_measures),
        "category_note": records.category_note,
        "head_accuracy": _head_accuracy(plan, output),
        "settings": dict(settings),
        "versions": {"lightning-peft": __version__} | {package: version(package) for package in _PACKAGES},
        "caveats": records.caveats(units) + [s for row in folds.values() for s in records.cell_caveats(row)],
    }
    for section in sections:
        results |= section.results()
    return results | {"sections": [_section(s, results) for s in sections if _is_measured(s, rows)]}


def _is_measured(section: Section, rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(name in row["metrics"] for row in rows for name in section.measures)


def _section(section: Section, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section's entry, which says all of its table but the numbers."""
    entry = {
        "name": section.name,
        "title": section.title,
        "measures": {name: measure.as_dict() for name, measure in section.measures.items()},
        "notes": section.notes(results),
        "below": section.below(results),
    }
    more = {"unit": section.unit, "price": section.price}
    return entry | {name: value for name, value in more.items() if value is not None}


def _row(
    row: Row, folds: Sequence[Cell], measures: Mapping[str, Measure], scores: Mapping[str, Scores], base: str
) -> dict[str, Any]:
    outcomes = [cell.result for cell in folds]
    failed = next((outcome["failed"] for outcome in outcomes if outcome["failed"]), None)
    metrics, difference, draws = {}, {}, {}
    for name, measure in measures.items():
        if not _has(measure, name, scores[row.name]):
            continue
        interval, by_draw = _value(measure, name, scores[row.name])
        metrics[name] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
        if len(by_draw) > 1:
            draws[name] = by_draw
        if row.name != base and _has(measure, name, scores[base]):
            difference[name] = _difference(measure, name, scores[row.name], scores[base])
    chosen: dict[str, list[Any]] = defaultdict(list)
    for outcome in outcomes:
        for name, value in outcome["chosen"].items():
            chosen[name].append(value)
    return {
        "method": row.name,
        "label": row.label,
        "kind": row.kind,
        "metrics": metrics,
        "difference": difference or None,
        "draws": draws,
        "trainable_parameters": max(outcome["trainable_parameters"] for outcome in outcomes),
        "edited_parameters": max(outcome["edited_parameters"] for outcome in outcomes),
        "adapter_bytes": max(outcome["adapter_bytes"] for outcome in outcomes),
        "seconds": sum(outcome["seconds"] for outcome in outcomes),
        "scoring_seconds": sum(outcome["scoring_seconds"] for outcome in outcomes),
        "failed": failed,
        "chosen": dict(chosen),
    }


def _has(measure: Measure, name: str, scores: Scores) -> bool:
    """Return whether a row's columns have what a measure takes."""
    return all(scores.get(column) for column in (measure.columns or (name,)))


def _value(measure: Measure, name: str, scores: Scores) -> tuple[Interval, list[float]]:
    """Return a measure on all units with its interval, and its value in each draw of demonstrations."""
    if measure.function is None:
        by_draw = _by_draw(scores[name], scores[name])
        return mean_interval(by_draw), by_draw.mean(1).tolist()
    columns, function = _Predictions(measure, [scores]), measure.function
    interval = statistics.function_interval(columns.of(0), columns.function)
    return interval, [float(function(*draw)) for draw in columns.draws[0]]


def _difference(measure: Measure, name: str, a: Scores, b: Scores) -> dict[str, float | None]:
    """Return the paired difference of a measure, over the units that both rows have."""
    if measure.function is None:
        shared = sorted(a[name].keys() & b[name].keys())
        x, y = _by_draw(a[name], shared), _by_draw(b[name], shared)
        difference, detectable = paired_difference(x, y), minimal_detectable(x, y)
    else:
        columns = _Predictions(measure, [a, b])
        difference = statistics.function_difference(columns.of(0), columns.of(1), columns.function)
        detectable = None
    return {
        "mean": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "p": difference.p,
        "mde": detectable,
    }


class _Predictions:
    """The columns that a measure's function takes, of one row or of two, on the units that all have.

    Units are resampled by their places, so that columns may be of any type, and all draws of a unit stay together: the
    function of several draws is its mean over them.

    Args:
        measure: with a function.
        rows: the columns of each row.
    """

    def __init__(self, measure: Measure, rows: Sequence[Scores]) -> None:
        assert measure.function is not None
        self._function = measure.function
        shared = set.intersection(*({*row[column]} for row in rows for column in measure.columns))
        self.units = sorted(shared)
        self.draws = [self._of_row(row, measure.columns) for row in rows]

    def of(self, row: int) -> list[NDArray[np.int64]]:
        """Return a row's one column: the place of each unit, counted through all rows."""
        return [np.arange(len(self.units)) + row * len(self.units)]

    def function(self, places: NDArray[np.int64]) -> float:
        """Return the measure on the units at these places, which are all of one row."""
        count = len(self.units)
        chosen = np.asarray(places) % count
        draws = self.draws[int(places[0]) // count]
        return float(np.mean([self._function(*(column[chosen] for column in columns)) for columns in draws]))

    def _of_row(self, row: Scores, names: Sequence[str]) -> list[list[NDArray[Any]]]:
        count = min(len(row[names[0]][unit]) for unit in self.units)
        return [[np.array([row[name][unit][draw] for unit in self.units]) for name in names] for draw in range(count)]


def _once(scores: Mapping[str, Mapping[int, float]]) -> Scores:
    """Return the scores of what is measured once, whatever the draws."""
    return {name: {i: [value] for i, value in values.items()} for name, values in scores.items()}


def _by_draw(values: Mapping[int, list[Any]], units: Iterable[int]) -> NDArray[np.float64]:
    """Return the scores of some units, `[draws, n]`."""
    return np.array([values[unit] for unit in units]).T


def _contrasts(plan: Plan, scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """Return the difference of the primary measure between pairs of rows."""
    name, contrasts = plan.task.primary, []
    measure = plan.task.measures[name]
    for a, b in _contrasted(plan):
        if _has(measure, name, scores[a]) and _has(measure, name, scores[b]):
            change = _difference(measure, name, scores[a], scores[b])
            contrasts.append({"a": a, "b": b, "metric": name, **{k: change[k] for k in ("mean", "low", "high", "p")}})
    return contrasts


def _contrasted(plan: Plan) -> list[tuple[str, str]]:
    """Return the pairs to contrast: edited against tuned and control rows, a stack against what it is on."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for row in plan.rows:
        kinds[row.kind].append(row.name)
    pairs = [(a, b) for a in kinds["edited"] for b in [*kinds["tuned"], *kinds["control"]]]
    return pairs + [(row.name, row.after) for row in plan.rows if row.kind == "stack" and row.after is not None]


def _categories(plan: Plan, cells: Sequence[Cell], scores: Mapping[str, Scores]) -> dict[str, dict[str, Any]]:
    """Return shares with their intervals, by category and row; `n` is the number of units."""
    records = plan.task.records
    category = records.categories([cell for cell in cells if not cell.failed])
    table: dict[str, dict[str, Any]] = {name: {"n": n} for name, n in sorted(Counter(category.values()).items())}
    for row in plan.rows:
        for measure in records.category_measures:
            shares: dict[str, list[float]] = defaultdict(list)
            for unit, draws in scores[row.name].get(measure, {}).items():
                shares[category[unit]].append(sum(draws) / len(draws))
            for name, values in shares.items():
                mean = sum(values) / len(values)
                low, high = wilson(mean, len(values))
                table[name].setdefault(row.name, {})[measure] = {"mean": mean, "low": low, "high": high}
    return table


def _head_accuracy(plan: Plan, output: Path) -> dict[str, Any] | None:
    """Return the probe accuracy by layer and head, mean over folds, as the first edited row's adapters note it."""
    edited = next((row for row in plan.rows if row.kind == "edited"), None)
    if edited is None:
        return None
    notes = [
        output / "cells" / f"{edited.name}-fold{f}" / "adapter" / "lightning_peft.json" for f in range(plan.task.folds)
    ]
    records = [json.loads(path.read_text(encoding="utf-8")).get("record") for path in notes if path.exists()]
    if not records or any("accuracy" not in (record or {}) for record in records):
        return None
    accuracy = torch.tensor([record["accuracy"] for record in records]).mean(0)
    return {"accuracy": accuracy.tolist(), "selected": records[0]["heads"]}
