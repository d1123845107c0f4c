"""The results of a sweep: a table of points with intervals, the chosen one, and what was measured where."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lightning_peft.compare.statistics import mean_interval, paired_difference
from lightning_peft.compare.writing import plural
from lightning_peft.files.records import write_atomically
from lightning_peft.moved.sweeps import completed, incomplete
from lightning_peft.sweep.settings import Sweep, chosen_by

_RESAMPLES = 2_000  # a few hundred intervals are made
_COLUMNS = ("mean", "low", "high")


@dataclass
class Measured:
    """Every point's numbers, the base first.

    Args:
        points: `(K, alpha)`.
        scores: for each unit, for each point, its score by measure.
        divergences: for each text and fold, for each point, KL(base ‖ edited) in nats, summed over the text's tokens.
        tokens: of each of these texts.
    """

    points: Sequence[tuple[int, float]]
    scores: dict[Any, list[dict[str, float]]] = field(default_factory=dict)
    divergences: list[list[float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(
        self, scores: Mapping[Any, list[dict[str, float]]], divergences: list[list[float]], tokens: list[int]
    ) -> None:
        """Add one fold."""
        for unit, row in scores.items():
            self.scores[len(self.scores), unit] = row  # a unit may be measured in several folds
        self.divergences += divergences
        self.tokens += tokens

    def measure(self, name: str, point: int) -> list[float]:
        """Return one point's scores, unit by unit, of the units that have choices for this measure."""
        return [row[point][name] for row in self.scores.values() if name in row[point]]

    def divergence(self, point: int) -> float | None:
        """Return KL(base ‖ edited) of one point, in nats per token."""
        if not self.tokens:
            return None
        return sum(row[point] for row in self.divergences) / sum(self.tokens)


def best_point(measured: Measured, measure: str, better: int = 1) -> tuple[int, float]:
    """Choose the point, not the base, of the best mean; of several the one that changes neutral text the least.

    Args:
        measured: every point's numbers.
        measure: its name.
        better: the sign of a change for the better.

    Raises:
        ValueError: no unit has choices for the measure.
    """
    if not measured.measure(measure, 0):
        raise ValueError(f"A point cannot be chosen by {measure}: nothing that was measured has choices for it.")

    def merit(point: int) -> tuple[float, float]:
        values = measured.measure(measure, point)
        return better * sum(values) / len(values), -(measured.divergence(point) or 0.0)

    return measured.points[max(range(1, len(measured.points)), key=merit)]


def collect(
    plan: Sweep,
    settings: Mapping[str, Any],
    model: str,
    units: int,
    measured: Measured,
    chosen: list[dict[str, Any]],
    confirmed: Measured | None,
) -> dict[str, Any]:
    """Return the content of `results.json`.

    Args:
        plan: the sweep.
        settings: the plan as it was written.
        model: the name of the base.
        units: how many the task has.
        measured: every point's numbers.
        chosen: each fold's choice.
        confirmed: the numbers of the base and of the choices on units that had no part in choosing.
    """
    task, choose = plan.task, chosen_by(plan)
    rows = [row for part in (measured, confirmed) if part is not None for row in part.scores.values()]
    left_out = incomplete([row[0] for row in rows])
    names = [n for n in task.measures if n == choose or (n not in left_out and any(n in row[0] for row in rows))]
    data = task.records.describe_data(units)
    data.pop("text", None)  # that of the task's side effects; a sweep has its own
    results = {
        "name": plan.name,
        "model": model,
        "measured": _measured_on(plan, len(measured.scores), sum(measured.tokens)),
        "data": data,
        "split": plan.split,
        "choose": choose,
        "points": [_entry(measured, names, point) for point in range(len(measured.points))],
        "chosen": chosen,
        "confirmed": None,
        "settings": dict(settings),
        "measures": {name: task.measures[name].as_dict() for name in names},
        "primary": task.primary,
        "unit": task.unit,
    }
    if confirmed is not None:
        base, choice = (_entry(confirmed, names, point) for point in range(2))
        results["confirmed"] = {plural(task.unit): len(confirmed.scores), "base": base, "chosen": choice}
    return results


def _measured_on(plan: Sweep, units: int, tokens: int) -> str:
    several = plural(plan.task.unit)
    if plan.split == "validation":
        how = f"validation {several}, each by interventions computed from the other training {several} of its fold"
    else:
        how = f"test {several}, each by interventions computed from the other folds; the best of these is not a choice"
    text = f"; KL on {tokens} tokens of neutral text, every one edited" if tokens else ""
    return f"{units} {how}{text}."


def _entry(measured: Measured, names: Sequence[str], point: int) -> dict[str, Any]:
    count, alpha = measured.points[point]
    entry: dict[str, Any] = {"num_heads": count, "alpha": alpha, "metrics": {}, "difference": {}}
    for name in names:
        values, base = measured.measure(name, point), measured.measure(name, 0)
        if len(values) < 2:
            continue
        mean = mean_interval(values, resamples=_RESAMPLES)
        entry["metrics"][name] = {column: getattr(mean, column) for column in _COLUMNS}
        if point:
            difference = paired_difference(values, base, resamples=_RESAMPLES)
            entry["difference"][name] = {column: getattr(difference, column) for column in (*_COLUMNS, "p")}
    entry["kl"] = _divergence(measured, point)
    return entry


def _divergence(measured: Measured, point: int) -> dict[str, float] | None:
    mean = measured.divergence(point)
    if mean is None:
        return None
    by_text = [row[point] / tokens for row, tokens in zip(measured.divergences, measured.tokens, strict=True)]
    if len(by_text) < 2:
        return {"mean": mean}
    interval = mean_interval(by_text, resamples=_RESAMPLES)
    return {"mean": mean, "low": interval.low, "high": interval.high}


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """Write `results.json` and `table.csv`."""
    write_atomically(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    text = io.StringIO()
    measures = list(completed(results)["measures"])
    names = [f"{measure}_{column}" for measure in (*measures, "kl") for column in _COLUMNS]
    differences = [f"{measure}_difference_{column}" for measure in measures for column in (*_COLUMNS, "p")]
    writer = csv.DictWriter(text, ["num_heads", "alpha", *names, *differences], lineterminator="\n")
    writer.writeheader()
    for entry in results["points"]:
        row = {"num_heads": entry["num_heads"], "alpha": entry["alpha"]}
        for measure, values in (*entry["metrics"].items(), ("kl", entry["kl"] or {})):
            row |= {f"{measure}_{column}": value for column, value in values.items()}
        for measure, values in entry["difference"].items():
            row |= {f"{measure}_difference_{column}": value for column, value in values.items()}
        writer.writerow(row)
    write_atomically(folder / "table.csv", text.getvalue())


def table(results: Mapping[str, Any]) -> Table:
    """Make a table of the points for the terminal, below it what was measured."""
    results = completed(results)
    measures, choose = results["measures"], results["choose"]
    names = [name for name in measures if name in results["points"][0]["metrics"]]
    rich_table = Table(title=f"{results['name']}: {results['model']}", caption=results["measured"], box=box.SIMPLE_HEAD)
    for name in ("K", "α", *(measures[name]["label"] for name in names), f"{measures[choose]['label']} − base", "KL"):
        rich_table.add_column(name, justify="right")
    for entry in results["points"]:
        place = ["base", ""] if entry["num_heads"] == 0 else [str(entry["num_heads"]), f"{entry['alpha']:g}"]
        cells = [_interval(entry["metrics"].get(name), _form(measures[name])) for name in names]
        difference = _interval(entry["difference"].get(choose), f"+{_form(measures[choose])}")
        rich_table.add_row(*place, *cells, difference, _interval(entry["kl"], ".4f"))
    return rich_table


def verdict(results: Mapping[str, Any]) -> list[str]:
    """Describe the choice, and its worth on units that had no part in it."""
    results = completed(results)
    measures, several = results["measures"], plural(results["unit"])
    by = measures[results["choose"]]
    lines = [
        f"Fold {choice['fold']}: the {'highest' if by['better'] > 0 else 'lowest'} {by['label']} on its validation "
        f"{several} is at K={choice['num_heads']}, α={choice['alpha']:g}."
        for choice in results["chosen"]
    ]
    if confirmed := results["confirmed"]:
        for name, change in confirmed["chosen"]["difference"].items():
            base, mean = confirmed["base"]["metrics"][name], confirmed["chosen"]["metrics"][name]
            form = _form(measures[name])
            lines.append(
                f"{measures[name]['label']} on the {confirmed[several]} test {several}: {mean['mean']:{form}} with the "
                f"choice, {base['mean']:{form}} without; {change['mean']:+{form}} [{change['low']:+{form}}, "
                f"{change['high']:+{form}}]."
            )
    return lines


def _form(measure: Mapping[str, Any]) -> str:
    """Return the format of a measure's values; of differences a sign stands before it."""
    return measure["written"] or ".3f"


def _interval(values: Mapping[str, float] | None, form: str) -> str:
    if values is None:
        return ""
    ends = f" [{values['low']:{form}}, {values['high']:{form}}]" if "low" in values else ""
    return f"{values['mean']:{form}}{ends}"
