"""Classification of texts is compared over seeds: a tiny BERT on a file of its own, with a test set or in folds."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback
from rich.console import Console
from sklearn.metrics import f1_score, matthews_corrcoef

from lightning_peft.callbacks import LoRA
from lightning_peft.compare import run as running
from lightning_peft.compare import statistics
from lightning_peft.compare.cell import cell_of
from lightning_peft.compare.plan import Plan, Row, check
from lightning_peft.compare.terminal import table
from lightning_peft.compare.verdict import verdict
from lightning_peft.files.data_error import DataError
from lightning_peft.tasks import Classification, Split
from lightning_peft.tasks.classification import folder_of, macro_f1, matthews

pytestmark = pytest.mark.filterwarnings("ignore")
SHORT: dict[str, Any] = {"learning_rates": [1e-3], "max_steps": 3, "epoch_steps": 2, "patience": 9}
ROWS = [
    Row("base", "Head alone", "base", Callback(), **SHORT),
    Row("lora", "LoRA", "tuned", LoRA(r=2), **SHORT),
]


def write(path: Path, count: int, split: Callable[[int], str] = lambda number: "") -> Path:
    rng = random.Random(0)
    rows = []
    for number in range(count):
        label = "abc"[number % 3]
        words = [f"{label}{rng.randrange(9)}" for _ in range(rng.randrange(2, 9))]
        rows.append({"text": f"{' '.join(words)} {number}", "label": label, "split": split(number)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("function_interval", "function_difference"):
        monkeypatch.setattr(statistics, name, partial(getattr(statistics, name), resamples=50))


@pytest.fixture
def notices(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", 60, lambda number: "test" if number >= 40 else "train")


def task_of(model: object, path: Path, **options: Any) -> Classification:
    return Classification(str(model), str(path), **{"test_split": {"split": "test"}, **options})


def run(plan: Plan) -> tuple[dict[str, Any], str]:
    console = Console(file=io.StringIO(), width=300)
    return running.run(plan, console=console), console.file.getvalue()  # type: ignore[attr-defined]


def test_two_rows_are_compared_over_two_seeds(
    tiny_folder: Callable[[str], Path], notices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(tiny_folder("bert"), notices, head_learning_rate=1e-2)
    plan = Plan("texts", ROWS, task, str(tmp_path / "run"), accelerator="cpu", seeds=[1, 4])
    results, _ = run(plan)
    assert [row["failed"] for row in results["rows"]] == [None, None]
    assert results["data"] == {"label": str(notices), "units": 20, "folds": 1} and results["seeds"] == [1, 4]
    folders = {path.name for path in (tmp_path / "run" / "cells").iterdir()}
    assert folders == {f"{row}-seed{seed}-fold0" for row in ("base", "lora") for seed in (1, 4)}
    for row in results["rows"]:
        assert set(row["metrics"]) == {"accuracy", "nll", "mcc", "f1"}
        for name, means in row["seeds"].items():
            assert row["metrics"][name]["mean"] == pytest.approx(np.mean(means)) and len(means) == 2
        of_cells = [
            json.loads((tmp_path / "run" / "cells" / f"{row['method']}-seed{seed}-fold0" / "result.json").read_text())
            for seed in (1, 4)
        ]
        nll = [np.mean([value for (value,) in cell["columns"]["nll"].values()]) for cell in of_cells]
        assert row["seeds"]["nll"] == pytest.approx(nll) and nll[0] != nll[1]
        trial = of_cells[0]["chosen"]["trials"][0]
        assert len(trial["val_losses"]) == 2, "a validation after two steps, and one after the last"
        assert of_cells[0]["step_seconds"] > 0
        assert (of_cells[0].get("peak_memory", 0) > 0) or not sys.platform.startswith("linux")
    assert results["rows"][1]["peak_memory"] == max(
        json.loads((tmp_path / "run" / "cells" / f"lora-seed{seed}-fold0" / "result.json").read_text())["peak_memory"]
        for seed in (1, 4)
    ) or not sys.platform.startswith("linux")
    console = Console(file=io.StringIO(), width=160)
    console.print(table(results))
    assert "(20 texts, 2 seeds)" in console.file.getvalue()  # type: ignore[attr-defined]
    said = " ".join(verdict(results))
    assert "Two seeds; intervals are over texts alone (from five seeds on they include seeds)." in said
    monkeypatch.setattr(running, "run_cell", lambda *_: pytest.fail("a finished cell was computed again"))
    assert run(plan)[1].count("finished before") == 4


def test_kept_cells_are_finished_ones_without_their_weights(
    tiny_folder: Callable[[str], Path], notices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location(
        "kept_cells", Path(__file__).parents[2] / "benchmarks" / "kept_cells.py"
    )
    assert spec is not None and spec.loader is not None
    kept_cells = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kept_cells)
    task = task_of(tiny_folder("bert"), notices)
    results, _ = run(Plan("texts", ROWS[:1], task, str(tmp_path / "run"), accelerator="cpu", seeds=[0, 1]))
    assert kept_cells.keep(tmp_path / "run", tmp_path / "kept") == 2
    assert kept_cells.restore(tmp_path / "kept", tmp_path / "again") == 2
    monkeypatch.setattr(running, "run_cell", lambda *_: pytest.fail("a kept cell was computed again"))
    again, _ = run(Plan("texts", ROWS[:1], task, str(tmp_path / "again"), accelerator="cpu", seeds=[0, 1]))
    assert again == results


def test_a_seed_draws_one_head_and_another_seed_another(tiny_folder: Callable[[str], Path], notices: Path) -> None:
    task = task_of(tiny_folder("bert"), notices)
    torch.manual_seed(3)
    first, again, other = task.module(1), task.module(seed=1), task.module(2)
    assert first.head.weight.equal(again.head.weight) and not first.head.weight.equal(other.head.weight)
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    task.module(1)
    assert torch.rand(1).equal(drawn), "what others draw does not depend on it"


def parts(task: Classification, split: Split, **options: Any) -> dict[str, set[int]]:
    data = task.data(split, **options)
    data.prepare_data()
    return {name: set(numbers) for name, numbers in data._parts.items()}


def test_a_test_set_of_its_own_is_all_that_is_tested_and_nothing_that_is_learnt(notices: Path) -> None:
    task = task_of("none", notices)
    outer = parts(task, Split(0, 1))
    assert outer["test"] == set(range(40, 60)) and outer["train"] | outer["val"] == set(range(40))
    inner = parts(task, Split(0, 1, inner=True))
    assert inner["test"] == inner["val"] == outer["val"] and not inner["train"] & inner["test"]
    check(Plan("x", ROWS, task))


def test_a_test_set_may_be_another_file_and_its_texts_are_not_learnt_from(notices: Path, tmp_path: Path) -> None:
    rows = notices.read_text().splitlines()
    other = tmp_path / "other.jsonl"
    same = json.loads(rows[3])
    other.write_text("\n".join([*rows[40:], json.dumps({**same, "text": same["text"].upper()})]) + "\n")
    task = task_of("none", notices, test_split=None, test_path=str(other))
    divided = parts(task, Split(0, 1))
    assert divided["test"] == set(range(60, 81))
    assert divided["train"] | divided["val"] == set(range(40)) - {3}


def test_folds_test_every_row_once_and_smaller_sizes_lie_in_larger_ones(notices: Path) -> None:
    task = task_of("none", notices, test_split=None, num_folds=3)
    folds = [parts(task, Split(fold, 3)) for fold in range(3)]
    assert sorted(number for fold in folds for number in fold["test"]) == list(range(60))
    assert not any(fold["test"] & (fold["train"] | fold["val"]) for fold in folds)
    ten, twenty = (parts(task, Split(0, 3, size=size), seed=5)["train"] for size in (10, 20))
    assert len(ten) == 10 and ten < twenty
    assert parts(task, Split(0, 3, size=10), seed=6)["train"] != ten


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"test_split": None, "num_folds": 1}, r"^folds of Classification must be at least 2"),
        ({"test_split": {"split": "tests"}}, r"has 'tests' as 'split' in no row: a test set is a part of the rows\.$"),
        ({"test_split": {"part": "test"}}, r"has no column 'part'"),
        ({"test_path": "x.csv"}, r"^The test set is test_path or test_split, not both\.$"),
        ({"limit": 5}, r"^limit draws from all rows"),
        ({"val_fraction": 0.0}, r"^val_fraction must be above 0"),
    ],
)
def test_what_cannot_be_tested_is_one_sentence(options: dict[str, Any], sentence: str, notices: Path) -> None:
    with pytest.raises((ValueError, DataError), match=sentence):
        check(Plan("x", ROWS, task_of("none", notices, **options)))


def test_measures_of_predictions_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 4):
        target, prediction = rng.integers(count, size=50), rng.integers(count, size=50)
        for guess in (prediction, target, np.zeros_like(target)):
            assert matthews(target, guess) == pytest.approx(matthews_corrcoef(target, guess))
            f1 = f1_score(target, guess, average="macro", zero_division=0)
            assert macro_f1(target, guess) == pytest.approx(f1)


def test_batches_are_padded_to_texts_of_like_length(tiny_folder: Callable[[str], Path], notices: Path) -> None:
    task = task_of(tiny_folder("bert"), notices)
    data = task.data(Split(0, 1), batch_size=4)
    data.tokenizer = task.module().tokenizer
    data.setup("test")
    batches = list(data.test_dataloader())
    lengths = [length for batch in batches for length in batch["attention_mask"].sum(1).tolist()]
    assert lengths == sorted(lengths)
    assert sorted(unit for batch in batches for unit in batch["unit"].tolist()) == list(range(40, 60))


def test_the_model_of_an_installed_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_model" / "model").mkdir(parents=True)
    (tmp_path / "some_model" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "no_model").mkdir()
    (tmp_path / "no_model" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert folder_of("installed:some_model") == str(tmp_path / "some_model" / "model")
    with pytest.raises(ValueError, match="is that of a Python package that is not installed: pip install missing_one"):
        folder_of("installed:missing_one")
    with pytest.raises(ValueError, match="which is no folder"):
        folder_of("installed:no_model")


def test_seeds_must_differ(notices: Path) -> None:
    with pytest.raises(ValueError, match=r"^seeds must be one or more numbers that differ, got \[1, 1\]"):
        check(Plan("x", ROWS, task_of("none", notices), seeds=[1, 1]))


def test_a_plans_one_seed_is_the_cells_whichever_way_it_is_said(notices: Path, tmp_path: Path) -> None:
    plans = [Plan("x", ROWS, task_of("none", notices), seed=3), Plan("x", ROWS, task_of("none", notices), seeds=[3])]
    for plan in plans:
        cell = cell_of(plan, ROWS[0], 0, tmp_path)
        assert cell.seed == 3 and cell.options == {"seed": 3} and plan.folder_name("base", 3, 0) == "base-fold0"
