"""Side effects over folds: means by document and question, and the table of what changed for the worse."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_peft.callbacks import LoRA
from lightning_peft.compare.measured import measured_table
from lightning_peft.compare.page import write_html
from lightning_peft.compare.plan import Plan, Row, check
from lightning_peft.compare.sections import section_views
from lightning_peft.compare.statistics import mean_interval
from lightning_peft.compare.terminal import table
from lightning_peft.compare.verdict import verdict
from lightning_peft.truthfulqa import SideEffects, forgotten
from lightning_peft.truthfulqa.side_effects_section import effect_scores, forgotten_scores
from lightning_peft.truthfulqa.task import TruthfulQA

FOLDS: list[dict[str, Any]] = [
    {"documents": [[100, 300.0, 310.0, 8.0], [20, 80.0, 90.0, 4.0]], "capability": {"1": 1.0, "2": 0.0, "3": 1.0}},
    {"documents": [[100, 300.0, 330.0, 6.0], [20, 80.0, 70.0, 2.0]], "capability": {"1": 0.0, "2": 0.0, "3": 1.0}},
]


def test_the_mean_over_documents_is_the_mean_over_tokens_and_folds() -> None:
    scores = effect_scores(FOLDS)
    assert sum(scores["ce"].values()) / 2 == pytest.approx((310 + 90 + 330 + 70) / 240)
    assert sum(scores["kl"].values()) / 2 == pytest.approx((8 + 4 + 6 + 2) / 240)
    assert scores["capability"] == {1: 0.5, 2: 0.0, 3: 1.0}


def test_folds_in_which_nothing_was_measured_are_passed_over() -> None:
    empty: dict[str, Any] = {"documents": [], "capability": {}}
    assert effect_scores([FOLDS[0], empty]) == effect_scores(FOLDS[:1])
    assert effect_scores([empty, {}]) == {}


def test_without_a_base_beside_it_there_is_cross_entropy_and_no_kl() -> None:
    unknown = {"documents": [[10, math.nan, 30.0, math.nan], [10, math.nan, 20.0, math.nan]], "capability": {}}
    assert effect_scores([unknown]) == {"ce": {0: 3.0, 1: 2.0}}


def test_the_mean_of_forgotten_scores_is_forgetting() -> None:
    before, after = {1: 1.0, 2: 0.0, 3: 1.0, 4: 1.0}, {1: 0.5, 2: 1.0, 3: 0.0, 4: 1.0}
    scores = forgotten_scores(before, after)
    assert mean_interval(list(scores.values())).mean == pytest.approx(forgotten(before, after)) == pytest.approx(0.5)
    assert forgotten_scores({1: 0.0}, {1: 1.0}) == {}


def difference(mean: float, reach: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "p": 0.1, "mde": 0.1}


@pytest.fixture
def results() -> dict[str, Any]:
    def row(name: str, metrics: dict[str, float], change: dict[str, Any] | None) -> dict[str, Any]:
        scores = {k: {"mean": v, "low": v - 0.1, "high": v + 0.1} for k, v in metrics.items()}
        shared = {"trainable_parameters": 0, "edited_parameters": 0, "adapter_bytes": 0, "seconds": 1.0}
        shared |= {"failed": None, "chosen": {}}
        return {"method": name, "label": name, "kind": "base", "metrics": scores, "difference": change, **shared}

    changed = {"mc2": difference(0.1, 0.01), "ce": difference(0.2, 0.1), "kl": difference(0.05, 0.01)}
    changed |= {"capability": difference(0.1, 0.01), "forgotten": difference(0.03, 0.05)}
    rows = [
        row("base", {"mc2": 0.4, "ce": 3.2, "kl": 0.0, "capability": 0.6, "forgotten": 0.0}, None),
        row("prompt", {"mc2": 0.4}, {"mc2": difference(0.0, 0.1)}),
        row("edit", {"mc2": 0.5, "ce": 3.4, "kl": 0.05, "capability": 0.7, "forgotten": 0.03}, changed),
    ]
    data = {"label": "Questions", "questions": 8, "folds": 2}
    data |= {"text": {"documents": 9, "source": "package", "sha256": "c0ffee" * 10, "tokens": 300}}
    return {"name": "x", "data": data, "model": {"pretrained": "m"}, "rows": rows}


def test_worse_is_red_better_is_green_and_unresolved_is_neither(results: dict[str, Any]) -> None:
    (view,) = section_views(results)
    assert [row["label"] for row in view["rows"]] == ["base", "edit"]
    assert [cell["change"] for cell in view["rows"][1]["cells"]] == ["down", "down", "up", ""]
    first = view["rows"][1]["cells"][0]
    assert (first["difference"], first["interval"]) == ("+0.200", "[+0.100, +0.300]")


def test_the_terminal_and_the_page_show_them_and_the_main_table_does_not(
    results: dict[str, Any], tmp_path: Path
) -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(measured_table(*section_views(results)))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= 120
    assert all(
        word in shown for word in ("CE", "KL", "Capability", "Forgotten", "3.400", "c0ffeec0ffee", "9 documents")
    )
    page = write_html(results, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Side effects" in page and "3.400" in page and "c0ffee" in page
    console.print(table(results))
    assert "CE" not in [column.header for column in table(results).columns]


def test_the_verdict_names_the_price_of_the_best(results: dict[str, Any]) -> None:
    sentence = "On neutral text it changes cross-entropy by +0.200 (95% interval +0.100 to +0.300) nats per token"
    assert verdict(results)[1] == f"{sentence}; KL from base is 0.050."
    results["rows"] = results["rows"][:2]
    assert not any("neutral text" in told for told in verdict(results))


def test_where_nothing_was_measured_nothing_is_shown(results: dict[str, Any], tmp_path: Path) -> None:
    for row in results["rows"]:
        row["metrics"] = {"mc2": row["metrics"]["mc2"]}
    assert section_views(results) == []
    assert "Side effects" not in write_html(results, tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("effects", "sentence"),
    [
        (SideEffects(tokens=100), r"need 2 documents \(256 tokens\)"),
        (SideEffects(capability=1), "and 2 questions for an interval"),
        (SideEffects(capability=999), "capability is 999, but there are"),
    ],
)
def test_side_effects_that_cannot_be_measured_are_one_sentence_at_the_start(
    effects: SideEffects, sentence: str
) -> None:
    rows = [Row("base", "Base", "base"), Row("lora", "LoRA", "tuned", LoRA(), learning_rates=[1e-3])]
    with pytest.raises(ValueError, match=sentence):
        check(Plan("x", rows, TruthfulQA("m", side_effects=effects)))
