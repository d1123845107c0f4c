"""What the cells of `behaviour.py` say: gains at equal KL, their rank among shuffled labels, intervals over pairs."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_peft.compare.statistics import Interval, mean_interval, paired_difference

Cell = Mapping[str, Any]
Scores = NDArray[np.float64]


def report(output: Path) -> dict[str, Any]:
    """Print a table of all finished cells and write what it is made from to `results.json`."""
    by_model: dict[str, list[Cell]] = defaultdict(list)
    for path in sorted((output / "cells").glob("*.json")):
        cell = json.loads(path.read_text())
        by_model[cell["model"]].append(cell)
    results = {model: of_model(cells) for model, cells in by_model.items()}
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for model, found in results.items():
        print("\n".join(table(model, found)))
    return results


def of_model(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the numbers of one model: of the base, of each method at each budget, and of the methods' differences."""
    [base] = [cell["points"][0] for cell in cells if cell["method"] == "base"]
    found: dict[str, Any] = {"base": {"log_odds": mean_log_odds(base), "likelier": share_likelier(base)}, "rows": []}
    methods = sorted({cell["method"] for cell in cells} - {"base"})
    true_gains: dict[tuple[str, float], Scores] = {}
    for method in methods:
        of_method = {cell["draw"]: cell["points"] for cell in cells if cell["method"] == method}
        drawn = sorted(draw for draw in of_method if draw is not None)
        for number, point in enumerate(of_method.get(None, [])):
            gain = log_odds(point) - log_odds(base)
            controls = np.array([log_odds(of_method[draw][number]) - log_odds(base) for draw in drawn])
            true_gains[method, point["budget"]] = gain
            row = {"method": method, "budget": point["budget"], "alpha": point["alpha"], "kl": point["kl"]}
            row |= {"gain": written(mean_interval(gain)), "likelier": share_likelier(point)}
            row["wanted"] = written(mean_interval(np.subtract(point["wanted"], base["wanted"])))
            row["unwanted"] = written(mean_interval(np.subtract(point["unwanted"], base["unwanted"])))
            row["draws"] = [round(float(mean), 4) for mean in controls.mean(1)] if drawn else []
            row["draws_kl"] = [of_method[draw][number]["kl"] for draw in drawn]
            if drawn:
                row["p"] = (1 + sum(mean >= gain.mean() for mean in controls.mean(1))) / (1 + len(drawn))
                row["less_draws"] = written(paired_difference(gain, controls.mean(0)))
            found["rows"].append(row)
    found["caa_less_iti"] = {
        str(budget): written(paired_difference(gain, true_gains["iti", budget]))
        for (method, budget), gain in true_gains.items()
        if method == "caa" and ("iti", budget) in true_gains
    }
    return found


def log_odds(point: Mapping[str, Any]) -> Scores:
    """Return how much likelier the wanted text of each pair is than the unwanted one, `[pairs]`, in nats."""
    return np.subtract(point["wanted"], point["unwanted"])


def mean_log_odds(point: Mapping[str, Any]) -> float:
    return float(log_odds(point).mean())


def share_likelier(point: Mapping[str, Any]) -> float:
    """Return the share of pairs whose wanted text is the likelier one."""
    return float((log_odds(point) > 0).mean())


def table(model: str, found: Mapping[str, Any]) -> list[str]:
    """Return the lines of a model's table."""
    base = found["base"]
    lines = [
        f"{model}: log-odds of the base {base['log_odds']:+.2f} nats a pair, wanted likelier in {base['likelier']:.0%}",
        "",
        "| KL | method | gain, nats a pair | shuffled labels: median, largest | p | gain less their mean "
        "| wanted likelier | wanted text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found["rows"], key=lambda row: (row["budget"], row["method"])):
        draws = row["draws"]
        control = f"{statistics.median(draws):+.2f}, {max(draws):+.2f} ({len(draws)})" if draws else "–"
        less = interval(row["less_draws"]) if draws else "–"
        p = f"{row['p']:.2f}" if draws else "–"
        lines.append(
            f"| {row['budget']:g} | {row['method'].upper()} | {interval(row['gain'])} | {control} | {p} | {less} "
            f"| {row['likelier']:.0%} | {interval(row['wanted'])} |"
        )
    lines += [""] + [f"CAA less ITI at {budget}: {interval(value)}" for budget, value in found["caa_less_iti"].items()]
    return [*lines, ""]


def interval(value: Mapping[str, float]) -> str:
    return f"{value['mean']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"


def written(value: Interval) -> dict[str, float]:
    return {name: round(number, 4) for name, number in asdict(value).items() if number is not None}
