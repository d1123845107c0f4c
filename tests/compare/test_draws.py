"""Demonstrations: none, some, and drawn several times."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from rich.console import Console
from tuning import ROOT

from lightning_peft.callbacks import ITI
from lightning_peft.cli import main
from lightning_peft.compare import cell
from lightning_peft.compare.plan import Plan, Row, check
from lightning_peft.compare.run import run as run_plan
from lightning_peft.models import CausalLM
from lightning_peft.sweep.settings import Sweep
from lightning_peft.sweep.settings import check as check_sweep
from lightning_peft.truthfulqa import SideEffects, TruthfulQADataModule, read_samples
from lightning_peft.truthfulqa.task import TruthfulQA

pytestmark = pytest.mark.filterwarnings("ignore")


def task(model: object = "m") -> TruthfulQA:
    return TruthfulQA(str(model), "package", limit=12, side_effects=SideEffects(tokens=0, capability=0))


@pytest.fixture
def run(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[Row], dict[str, Any]]:
    def cell_of(row: Row) -> dict[str, Any]:
        plan = Plan("draws", [Row("base", "", "base"), row], task(tiny_folder("llama")), accelerator="cpu")
        check(plan)
        return cell.run_cell(plan, row, 0, tmp_path / row.name, {})

    return cell_of


def logprobs(found: dict[str, Any], draw: int = 0) -> list[float]:
    return [sample["logprob"] for sample in found["samples"] if sample["draw"] == draw]


def test_no_demonstrations_are_an_empty_primer(
    run: Callable[[Row], dict[str, Any]], tiny_folder: Callable[[str], Path]
) -> None:
    module, scores = CausalLM(str(tiny_folder("llama"))), task().scores()
    data = TruthfulQADataModule("package", limit=12, primer="", protocol=task().protocol)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    L.Trainer(callbacks=[scores], **options).test(module, data, verbose=False)
    found = logprobs(run(Row("zero", "", "prompt", few_shot=0)))
    assert found == [choice["logprob"] for choice in scores.choices] != logprobs(run(Row("six", "", "prompt")))


def test_the_first_draw_is_that_of_one_draw_and_the_next_is_another(run: Callable[[Row], dict[str, Any]]) -> None:
    one, two = (run(Row(f"x{draws}", "", "prompt", few_shot=3, draws=draws)) for draws in (1, 2))
    assert logprobs(two, 0) == logprobs(one) != logprobs(two, 1) and len(logprobs(two, 1)) == len(logprobs(one))


def test_an_edit_is_computed_once_and_scored_under_each_draw(
    run: Callable[[Row], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, compute = [], cell._edit
    monkeypatch.setattr(cell, "_edit", lambda *given: computed.append(given) or compute(*given))
    found = run(Row("both", "", "edited", ITI(num_heads=3, alpha=5.0), few_shot=3, draws=3))
    assert len(computed) == 1 and len({tuple(logprobs(found, draw)) for draw in range(3)}) == 3
    written = read_samples(tmp_path / "both" / "samples_truthfulqa_mc2.jsonl")
    assert written
    assert {float(r[0]) for sample in written for r in sample["filtered_resps"]} <= set(logprobs(found, 0))


def smaller(tiny: Path, output: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan of table 1 with these rows for a tiny model and few questions."""
    plan = yaml.safe_load((ROOT / "configs" / "compare" / "table1.yaml").read_text())
    effects = {"tokens": 256, "capability": 8}
    plan["task"]["init_args"] = {"model": str(tiny), "source": "package", "limit": 16, "side_effects": effects}
    return plan | {"rows": rows, "output": str(output), "accelerator": "cpu"}


def test_every_row_of_table_1_runs(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = yaml.safe_load((ROOT / "configs" / "compare" / "table1.yaml").read_text())["rows"]
    for row in rows:
        row["few_shot"] = min(row["few_shot"], 6) if "few_shot" in row else None
        row.pop("max_epochs", None)
        if "num_heads" in row.get("callback", {}).get("init_args", {}):
            row["callback"]["init_args"]["num_heads"] = 3
        if "scoring" in row and row["name"] == "rtd":
            row["scoring"]["init_args"]["k"] = 4
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(smaller(tiny_folder("llama"), tmp_path / "run", rows)))
    main(["compare", "--config", str(path)])
    found = {row["method"]: row for row in json.loads((tmp_path / "run" / "results.json").read_text())["rows"]}
    assert list(found) == [row["name"] for row in rows] and not any(row["failed"] for row in found.values())
    measured = {name for name, row in found.items() if "kl" in row["metrics"]}
    assert measured == {"base", "lora", "iti", "few_shot_iti", "iti_random"}
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    draws = {name: len({s["draw"] for s in samples if s["method"] == name}) for name in found}
    assert {name for name, number in draws.items() if number == 3} == {"few_shot_5", "few_shot_50"}
    for name in ("few_shot_5", "few_shot_50"):
        means = found[name]["draws"]["mc2"]
        assert len(set(means)) == 3 and found[name]["metrics"]["mc2"]["mean"] == pytest.approx(sum(means) / 3)
    assert "over 3 draws of demonstrations; its interval holds for these draws" in capsys.readouterr().out


def test_more_demonstrations_than_a_fold_leaves_are_refused_before_anything_runs(tmp_path: Path) -> None:
    row = Row("many", "", "prompt", few_shot=7)
    plan = Plan("x", [Row("base", "", "base"), row], task("no model"), output=str(tmp_path))
    with pytest.raises(ValueError, match=r"^Row 'many' asks for 7 demonstrations, but a fold leaves 6 questions to"):
        run_plan(plan, {"rows": {"base": {}, "many": {}}}, Console(file=io.StringIO()))
    assert all(path.name.startswith(".lock") for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (Row("x", "", "prompt", few_shot=-1), r"asks for -1 demonstrations"),
        (Row("x", "", "prompt", draws=2), r"has 2 draws: at least 1, and more only with few_shot"),
        (Row("x", "", "prompt", few_shot=0, draws=2), r"has 2 draws"),
        (Row("x", "", "prompt", few_shot=5, draws=0), r"has 0 draws"),
    ],
)
def test_draws_of_nothing_are_refused(row: Row, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check(Plan("x", [Row("base", "", "base"), row], task()))


def test_fewer_than_no_demonstrations_are_refused() -> None:
    with pytest.raises(ValueError, match="few_shot must be at least 0, got -1"):
        TruthfulQADataModule(few_shot=-1)
    with pytest.raises(ValueError, match="few_shot must be at least 0, got -1"):
        check_sweep(Sweep("x", "m", [3], [5.0], few_shot=-1))
