"""The results of finished cells, put together: scores by unit, intervals, differences, what the report needs."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from lightning_peft import __version__
from lightning_peft.compare.cell_facts import row_facts
from lightning_peft.compare.plan import Plan, Row
from lightning_peft.compare.values import difference_of, has_measure, value_of
from lightning_peft.editing.intervals import wilson
from lightning_peft.tasks.cell import Cell
from lightning_peft.tasks.cell_records import Scores
from lightning_peft.tasks.measure import Measure
from lightning_peft.tasks.section import Section

_PACKAGES = ("torch", "lightning", "transformers", "peft", "torchmetrics", "scikit-learn")


def collect(
    plan: Plan,
    settings: Mapping[str, Any],
    cells: Mapping[tuple[str, int, int], Cell],
    sections: Sequence[Section],
) -> dict[str, Any]:
    """Put finished cells together into the content of `results.json`.

    Args:
        plan: the plan.
        settings: the plan as it was written.
        cells: by row, seed and fold, with their results.
        sections: the task's, prepared.
    """
    task, records = plan.task, plan.task.records
    base = next(row.name for row in plan.rows if row.kind == "base")
    by_seed = {
        row.name: [[cells[row.name, seed, fold] for fold in range(task.folds)] for seed in plan.all_seeds]
        for row in plan.rows
    }
    folds = {name: [cell for seed in seeds for cell in seed] for name, seeds in by_seed.items()}
    whole = {name: not any(cell.failed for cell in row) for name, row in folds.items()}
    scores: dict[str, Scores] = {
        name: _together([records.scores(seed) for seed in seeds]) if whole[name] else {}
        for name, seeds in by_seed.items()
    }
    measures = dict(task.measures)
    for section in sections:
        measures |= section.measures
        for name, seeds in by_seed.items():
            if whole[name]:
                bases = by_seed[base] if whole[base] else [()] * len(seeds)
                found = [_once(section.scores(seed, of_base)) for seed, of_base in zip(seeds, bases, strict=True)]
                scores[name] |= _together(found)
    units = len(
        {unit for row in folds.values() for cell in row if not cell.failed for unit in records.units(cell.result)}
    )
    undefined: list[str] = []
    rows = [_row(plan, row, folds[row.name], measures, scores, base, undefined) for row in plan.rows]
    for section in sections:
        for entry in rows:
            entry |= section.row_results(by_seed[entry["method"]][0])
    results = {
        "name": plan.name,
        "data": records.describe_data(units),
        "model": records.describe_model(),
        "measures": {name: measure.as_dict() for name, measure in task.measures.items()},
        "primary": task.primary,
        "unit": task.unit,
        "label": task.label,
        "rows": rows,
        "contrasts": _contrasts(plan, rows, scores),
        "categories": _categories(plan, list(cells.values()), scores),
        "category_measures": list(records.category_measures),
        "category_note": records.category_note,
        "head_accuracy": _head_accuracy(plan, by_seed),
        "settings": dict(settings),
        "versions": {"lightning-peft": __version__} | {package: version(package) for package in _PACKAGES},
        "caveats": [
            *records.caveats(units),
            *(s for seeds in by_seed.values() for s in records.cell_caveats(seeds[0])),
            *undefined,
        ],
    }
    if len(plan.all_seeds) > 1:
        results["seeds"] = plan.all_seeds
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
    plan: Plan,
    row: Row,
    folds: Sequence[Cell],
    measures: Mapping[str, Measure],
    scores: Mapping[str, Scores],
    base: str,
    undefined: list[str],
) -> dict[str, Any]:
    """Return a row's entry; add a sentence to `undefined` for each function that gives nothing on its predictions."""
    outcomes = [cell.result for cell in folds]
    failed = next((outcome["failed"] for outcome in outcomes if outcome["failed"]), None)
    metrics, difference, draws, seeds = {}, {}, {}, {}
    for name, measure in measures.items():
        if not has_measure(measure, name, scores[row.name]):
            continue
        try:
            interval, by_draw = value_of(measure, name, scores[row.name])
            metrics[name] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
            if (count := len(plan.all_seeds)) > 1:
                seeds[name] = np.array(by_draw).reshape(count, -1).mean(1).tolist()
            elif len(by_draw) > 1:
                draws[name] = by_draw
            if row.name != base and has_measure(measure, name, scores[base]):
                difference[name] = difference_of(measure, name, scores[row.name], scores[base])
        except Exception as error:
            if measure.function is None:
                raise
            # a function that is undefined on these predictions: the cells' other measures are worth having
            undefined.append(f"{row.label}: {measure.label} could not be computed ({type(error).__name__}: {error}).")
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
        **({"seeds": seeds} if seeds else {}),
        **row_facts(outcomes),
        "failed": failed,
        "chosen": dict(chosen),
    }


def _together(seeds: Sequence[Scores]) -> Scores:
    """Return the scores of all seeds, those of a unit behind each other."""
    return {
        name: {unit: [value for seed in seeds for value in seed[name][unit]] for unit in values}
        for name, values in seeds[0].items()
    }


def _once(scores: Mapping[str, Mapping[int, float]]) -> Scores:
    """Return the scores of what is measured once, whatever the draws."""
    return {name: {i: [value] for i, value in values.items()} for name, values in scores.items()}


def _contrasts(plan: Plan, rows: Sequence[Mapping[str, Any]], scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """Return the difference of the primary measure between pairs of rows."""
    name, contrasts = plan.task.primary, []
    measure, valued = plan.task.measures[name], {row["method"] for row in rows if name in row["metrics"]}
    for a, b in _contrasted(plan):
        if a in valued and b in valued:
            change = difference_of(measure, name, scores[a], scores[b])
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


def _head_accuracy(plan: Plan, cells: Mapping[str, Sequence[Sequence[Cell]]]) -> dict[str, Any] | None:
    """Return the probe accuracy by layer and head, mean over folds, as the first edited row's adapters note it."""
    edited = next((row for row in plan.rows if row.kind == "edited"), None)
    if edited is None:
        return None
    notes = [cell.folder / "adapter" / "lightning_peft.json" for cell in cells[edited.name][0]]
    records = [json.loads(path.read_text(encoding="utf-8")).get("record") for path in notes if path.exists()]
    if not records or any("accuracy" not in (record or {}) for record in records):
        return None
    accuracy = torch.tensor([record["accuracy"] for record in records]).mean(0)
    return {"accuracy": accuracy.tolist(), "selected": records[0]["heads"]}
