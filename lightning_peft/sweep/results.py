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
from torch import Tensor

from lightning_peft.compare.statistics import mean_interval, paired_difference
from lightning_peft.files.records import write_atomically
from lightning_peft.sweep.settings import Sweep
from lightning_peft.truthfulqa.metrics import mc0, mc1, mc2

_METRICS = {"mc0": mc0, "mc1": mc1, "mc2": mc2}
_RESAMPLES = 2_000  # a few hundred intervals are made
_COLUMNS = ("mean", "low", "high")


@dataclass
class Measured:
    """Every point's numbers, the base first.

    Args:
        points: `(K, alpha)`.
        scores: for each question, for each point, its metrics.
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
        for question, row in scores.items():
            self.scores[len(self.scores), question] = row  # a question may be asked in several folds
        self.divergences += divergences
        self.tokens += tokens

    def metric(self, name: str, point: int) -> list[float]:
        """Return one point's scores, question by question, of the questions that have choices for this metric."""
        return [row[point][name] for row in self.scores.values() if name in row[point]]

    def divergence(self, point: int) -> float | None:
        """Return KL(base ‖ edited) of one point, in nats per token."""
        if not self.tokens:
            return None
        return sum(row[point] for row in self.divergences) / sum(self.tokens)


def metrics_of(logprobs: Tensor, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute MC0, MC1 and MC2 of one question, those that it has choices for.

    Args:
        logprobs: `[C]`, in nats.
        batch: `mc0`, `mc1` and `mc2 [C]`.
    """
    return {
        name: score(logprobs, batch[name]) for name, score in _METRICS.items() if {0, 1} <= set(batch[name].tolist())
    }


def best_point(measured: Measured, metric: str) -> tuple[int, float]:
    """Choose the point, not the base, of the highest mean; of several the one that changes neutral text the least.

    Raises:
        ValueError: no question has choices for the metric.
    """
    if not measured.metric(metric, 0):
        raise ValueError(f"A point cannot be chosen by {metric}: no question has choices for it.")

    def merit(point: int) -> tuple[float, float]:
        values = measured.metric(metric, point)
        return sum(values) / len(values), -(measured.divergence(point) or 0.0)

    return measured.points[max(range(1, len(measured.points)), key=merit)]


def collect(
    plan: Sweep,
    settings: Mapping[str, Any],
    measured: Measured,
    chosen: list[dict[str, Any]],
    confirmed: Measured | None,
    questions: int,
    hashed: str,
) -> dict[str, Any]:
    """Return the content of `results.json`."""
    return {
        "name": plan.name,
        "model": plan.model,
        "measured": _measured_on(plan, len(measured.scores), sum(measured.tokens)),
        "data": {"source": plan.data.source, "questions": questions, "hash": hashed, "folds": plan.data.num_folds},
        "split": plan.split,
        "choose": plan.choose,
        "points": [_entry(measured, point) for point in range(len(measured.points))],
        "chosen": chosen,
        "confirmed": None
        if confirmed is None
        else {"questions": len(confirmed.scores), "base": _entry(confirmed, 0), "chosen": _entry(confirmed, 1)},
        "settings": dict(settings),
    }


def _measured_on(plan: Sweep, questions: int, tokens: int) -> str:
    if plan.split == "validation":
        how = "validation questions, each by interventions computed from the other training questions of its fold"
    else:
        how = "test questions, each by interventions computed from the other folds; the best of these is not a choice"
    text = f"; KL on {tokens} tokens of neutral text, every one edited" if tokens else ""
    return f"{questions} {how}{text}."


def _entry(measured: Measured, point: int) -> dict[str, Any]:
    count, alpha = measured.points[point]
    entry: dict[str, Any] = {"num_heads": count, "alpha": alpha, "metrics": {}, "difference": {}}
    for name in _METRICS:
        values, base = measured.metric(name, point), measured.metric(name, 0)
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
    names = [f"{metric}_{column}" for metric in (*_METRICS, "kl") for column in _COLUMNS]
    differences = [f"{metric}_difference_{column}" for metric in _METRICS for column in (*_COLUMNS, "p")]
    writer = csv.DictWriter(text, ["num_heads", "alpha", *names, *differences], lineterminator="\n")
    writer.writeheader()
    for entry in results["points"]:
        row = {"num_heads": entry["num_heads"], "alpha": entry["alpha"]}
        for metric, values in (*entry["metrics"].items(), ("kl", entry["kl"] or {})):
            row |= {f"{metric}_{column}": value for column, value in values.items()}
        for metric, values in entry["difference"].items():
            row |= {f"{metric}_difference_{column}": value for column, value in values.items()}
        writer.writerow(row)
    write_atomically(folder / "table.csv", text.getvalue())


def table(results: Mapping[str, Any]) -> Table:
    """Make a table of the points for the terminal, below it what was measured."""
    metrics = [name for name in _METRICS if name in results["points"][0]["metrics"]]
    rich_table = Table(title=f"{results['name']}: {results['model']}", caption=results["measured"], box=box.SIMPLE_HEAD)
    for name in ("K", "α", *(metric.upper() for metric in metrics), f"{results['choose'].upper()} − base", "KL"):
        rich_table.add_column(name, justify="right")
    for entry in results["points"]:
        place = ["base", ""] if entry["num_heads"] == 0 else [str(entry["num_heads"]), f"{entry['alpha']:g}"]
        rich_table.add_row(*place, *_cells(entry, metrics, results["choose"]))
    return rich_table


def verdict(results: Mapping[str, Any]) -> list[str]:
    """Describe the choice, and its worth on questions that had no part in it."""
    lines = [
        f"Fold {choice['fold']}: the highest {results['choose'].upper()} on its validation questions is at "
        f"K={choice['num_heads']}, α={choice['alpha']:g}."
        for choice in results["chosen"]
    ]
    if confirmed := results["confirmed"]:
        for metric, change in confirmed["chosen"]["difference"].items():
            base, mean = confirmed["base"]["metrics"][metric], confirmed["chosen"]["metrics"][metric]
            lines.append(
                f"{metric.upper()} on the {confirmed['questions']} test questions: {mean['mean']:.3f} with the choice, "
                f"{base['mean']:.3f} without; {change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]."
            )
    return lines


def _cells(entry: Mapping[str, Any], metrics: Sequence[str], choose: str) -> list[str]:
    def interval(values: Mapping[str, float] | None, form: str) -> str:
        if values is None:
            return ""
        ends = f" [{values['low']:{form}}, {values['high']:{form}}]" if "low" in values else ""
        return f"{values['mean']:{form}}{ends}"

    cells = [interval(entry["metrics"].get(metric), ".3f") for metric in metrics]
    return [*cells, interval(entry["difference"].get(choose), "+.3f"), interval(entry["kl"], ".4f")]
