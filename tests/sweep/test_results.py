"""A table says what its task measures, whichever way is better, and results of releases before are read as ever."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from ab_questions import ABQuestions
from rich.console import Console

from lightning_peft.sweep.plot import against_divergence
from lightning_peft.sweep.results import Measured, best_point, collect, table, verdict, write_results
from lightning_peft.sweep.settings import Sweep
from lightning_peft.truthfulqa.task import TruthfulQA


def test_ties_go_to_the_smaller_divergence() -> None:
    measured = Measured([(0, 0.0), (4, 1.0), (4, 2.0), (8, 1.0)])
    scores = {0: [{"accuracy": value} for value in (0.9, 0.6, 0.5, 0.6)]}
    measured.add(scores, [[0.0, 3.0, 1.0, 2.0]], [10])
    assert best_point(measured, "accuracy") == (8, 1.0)
    assert best_point(measured, "accuracy", better=-1) == (4, 2.0), "where less is better"
    with pytest.raises(ValueError, match="cannot be chosen by surprise: nothing that was measured has choices for it"):
        best_point(measured, "surprise")


def swept(choose: str | None = None, **options: Any) -> dict[str, Any]:
    """Results of a task of one's own, of two units."""
    plan = Sweep("mine", ABQuestions("m"), [4], [1.0, 2.0], choose=choose, **options)
    measured = Measured([(0, 0.0), *plan.points])
    rows = [[{"accuracy": float(a), "surprise": 3.0 - a} for a in (0, 1, unit)] for unit in range(2)]
    measured.add(dict(enumerate(rows)), [[0.0, 0.1, 0.4], [0.0, 0.2, 0.6]], [2, 2])
    confirmed = Measured([(0, 0.0), (-1, 0.0)])
    confirmed.add({unit: row[:2] for unit, row in enumerate(rows)}, [[0.0, 0.1]], [2])
    chosen = [{"fold": 0, "num_heads": 4, "alpha": 1.0}]
    return collect(plan, {}, "the-model", 2, measured, chosen, confirmed)


def printed(results: dict[str, Any]) -> str:
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(table(results))
    return console.export_text()


def test_the_table_and_the_verdict_are_in_the_words_of_the_task(tmp_path: Path) -> None:
    results = swept()
    lines = printed(results).splitlines()
    assert "mine: the-model" in lines[0] and "2 validation units, each by interventions" in "".join(lines)
    assert lines[2].split() == ["K", "α", "Right", "Surprise", "Right", "−", "base", "KL"]
    best = next(line for line in lines if line.split()[:2] == ["4", "1"])
    assert best.split()[2:] == [
        "1.00",
        "[1.00,",
        "1.00]",
        "2.000",
        "[2.000,",
        "2.000]",
        "+1.00",
        "[+1.00,",
        "+1.00]",
        "0.0750",
        "[0.0500,",
        "0.1000]",
    ]
    assert verdict(results) == [
        "Fold 0: the highest Right on its validation units is at K=4, α=1.",
        "Right on the 2 test units: 1.00 with the choice, 0.00 without; +1.00 [+1.00, +1.00].",
        "Surprise on the 2 test units: 2.000 with the choice, 3.000 without; -1.000 [-1.000, -1.000].",
    ]
    assert verdict(swept("surprise"))[0] == "Fold 0: the lowest Surprise on its validation units is at K=4, α=1."
    write_results(results, tmp_path)
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["surprise_mean"] for row in rows] == ["3.0", "2.0", "2.5"]
    assert rows[1]["accuracy_difference_mean"] == "1.0"


@pytest.mark.parametrize(
    ("choose", "shown"),
    [("mc0", "MC0 MC2"), ("mc1", "MC1 MC2"), ("mc2", "MC1 MC2"), ("mc3", "MC2 MC3")],
)
def test_the_picture_shows_the_primary_measure_and_the_chosen_one_or_a_neighbour(choose: str, shown: str) -> None:
    plan = Sweep("x", TruthfulQA("m"), [4], [1.0], choose=choose)
    measured = Measured([(0, 0.0), *plan.points])
    row = dict.fromkeys(("mc0", "mc1", "mc2", "mc3"), 0.5)
    measured.add({0: [row, row], 1: [row, row]}, [[0.0, 0.1]], [2])
    results = collect(plan, {}, "m", 2, measured, [], None)
    assert [axes.get_ylabel() for axes in against_divergence(results).axes] == shown.split()


def test_the_picture_of_a_task_of_ones_own_has_its_measures() -> None:
    assert [axes.get_ylabel() for axes in against_divergence(swept()).axes] == ["Right", "Surprise"]


def before() -> dict[str, Any]:
    """Results as a release before wrote them."""
    results = swept()
    for entry in (*results["points"], results["confirmed"]["base"], results["confirmed"]["chosen"]):
        for kind in ("metrics", "difference"):
            entry[kind] = {"mc1": entry[kind].get("surprise"), "mc2": entry[kind].get("accuracy")}
            entry[kind] = {name: values for name, values in entry[kind].items() if values is not None}
    results["confirmed"]["questions"] = results["confirmed"].pop("units")
    for name in ("measures", "primary", "unit"):
        del results[name]
    return results | {"choose": "mc2"}


def test_results_of_a_release_before_are_shown_as_before() -> None:
    results = before()
    assert printed(results).splitlines()[2].split() == ["K", "α", "MC1", "MC2", "MC2", "−", "base", "KL"]
    assert "1.000 [1.000, 1.000]" in printed(results)
    assert verdict(results)[0] == "Fold 0: the highest MC2 on its validation questions is at K=4, α=1."
    assert "MC2 on the 2 test questions: 1.000 with the choice, 0.000 without" in verdict(results)[2]
    assert [axes.get_ylabel() for axes in against_divergence(results).axes] == ["MC1", "MC2"]


def test_a_measure_that_parts_of_a_release_before_lack_is_left_out() -> None:
    plan = Sweep("x", TruthfulQA("m"), [4], [1.0])
    rows = {0: [{"mc2": 0.5}, {"mc2": 0.6}], 1: [{"mc2": 0.5, "mc3": 1.0}, {"mc2": 0.6, "mc3": 1.0}]}
    measured = Measured([(0, 0.0), *plan.points])
    measured.add(rows, [], [])
    assert [*collect(plan, {}, "m", 2, measured, [], None)["measures"]] == ["mc2"]
    measured.scores.pop((0, 0))
    assert [*collect(plan, {}, "m", 2, measured, [], None)["measures"]] == ["mc2", "mc3"]
