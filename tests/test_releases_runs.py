"""Comparisons, sweeps and recipes of earlier releases go on, are shown and parsed, as they were written."""

from __future__ import annotations

import functools
import json
import tarfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from jsonargparse import ArgumentParser
from letters import letters_folder
from released import FIRST, unpack
from rich.console import Console
from tiny_models import tiny

from lightning_peft import load_adapter
from lightning_peft.cli import main
from lightning_peft.compare import run as comparing
from lightning_peft.compare import terminal
from lightning_peft.compare.page import write_html
from lightning_peft.compare.plan import Plan
from lightning_peft.compare.plan import check as check_plan
from lightning_peft.compare.verdict import verdict
from lightning_peft.sweep import results as sweeping
from lightning_peft.sweep.settings import Sweep
from lightning_peft.sweep.settings import check as check_sweep

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a comparison and a sweep of the release, their plans and their model, as the working directory."""
    folder = unpack("results", tmp_path)
    monkeypatch.chdir(folder)
    letters_folder(Path("model"), "llama")
    return folder


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the release's `configs`, and with `printed`, each recipe's whole configuration."""
    return unpack("recipes", tmp_path_factory.mktemp("release"))


def results(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "results.json").read_text())


def rounded(value: Any) -> Any:
    """Round all numbers to 6 digits behind the point: means are summed in another order on another processor."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 6) if isinstance(value, float) else value


def test_its_comparison_is_finished_and_computes_nothing_again(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = results("compare")
    monkeypatch.setattr(comparing, "run_cell", lambda *_: pytest.fail("a finished cell was computed again"))
    main(["compare", "--config", "compare.yaml"])
    after = results("compare")
    assert rounded(after["rows"]) == rounded(before["rows"]) and len(before["rows"]) == 6
    assert not any(row["failed"] for row in before["rows"])
    for name in ("contrasts", "categories", "head_accuracy", "data"):
        assert rounded(after[name]) == rounded(before[name])


def test_its_comparison_is_shown_from_its_results_alone(runs: Path, tmp_path: Path) -> None:
    before = results("compare")
    console = Console(record=True, width=120)
    console.print(terminal.table(before))
    shown = console.export_text()
    assert all(row["label"] in shown for row in before["rows"])
    assert "LoRA" in write_html(before, tmp_path / "report.html").read_text() and verdict(before)


def test_its_sweep_gives_the_same_numbers_and_choice(runs: Path) -> None:
    before = results("sweep")
    assert sweeping.table(before).row_count == 3 and sweeping.verdict(before)
    main(["sweep", "--config", "sweep.yaml"])
    after = results("sweep")
    assert after["chosen"] == before["chosen"] and after["measured"] == before["measured"]
    for old, new in zip(before["points"], after["points"], strict=True):
        assert new["metrics"]["mc2"] == pytest.approx(old["metrics"]["mc2"], abs=1e-6)
        assert new["kl"] == pytest.approx(old["kl"], abs=1e-6)


@pytest.mark.parametrize("cell", ["lora-fold0", "iti-fold1", "lora_iti-fold0"])
def test_the_adapters_of_its_cells_load(cell: str, runs: Path) -> None:
    parts = load_adapter(tiny("llama"), runs / "compare" / "cells" / cell / "adapter")
    assert [part.name for part in parts] == (["lora", "iti"] if "_" in cell else ["default"])


with tarfile.open(FIRST / "recipes.tar.xz") as archive:
    RECIPES = sorted(path for path in archive.getnames() if path.startswith("configs/"))
VERBS = [Path(path).stem for path in RECIPES if path.count("/") == 1]  # for fit; the others are of commands


def build(path: Path, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `fit` build everything a configuration names, on a tiny model, and assert that it is there."""
    fitted: list[tuple[L.Trainer, Any]] = []

    @functools.wraps(L.Trainer.fit)
    def fit(trainer: L.Trainer, *args: Any, datamodule: Any = None, **kwargs: Any) -> None:
        fitted.append((trainer, datamodule))

    monkeypatch.setattr(L.Trainer, "fit", fit)
    options = [f"--model.init_args.pretrained={model}", f"--trainer.default_root_dir={folder}"]
    main(["fit", "--config", str(path), "--trainer.accelerator=cpu", *options])
    ((trainer, data),) = fitted
    config = yaml.safe_load(path.read_text())
    built = {type(callback).__name__ for callback in trainer.callbacks}  # type: ignore[attr-defined]
    assert {entry["class_path"].rpartition(".")[2] for entry in config["trainer"]["callbacks"]} <= built
    assert type(data).__name__ == config["data"]["class_path"].rpartition(".")[2]


@pytest.mark.parametrize("name", VERBS)
def test_its_configurations_with_every_default_build_what_they_name(
    name: str, recipes: Path, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(recipes / "printed" / f"{name}.yaml", tiny_folder("llama"), tmp_path, monkeypatch)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [*VERBS, "judge/info", "judge/truth"])
def test_its_recipes_build_what_they_name(
    name: str, recipes: Path, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(recipes / "configs" / f"{name}.yaml", tiny_folder("llama"), tmp_path, monkeypatch)


@pytest.mark.parametrize("path", [path for path in RECIPES if path.startswith(("configs/compare", "configs/sweep"))])
def test_its_plans_parse_and_can_be_run_to_their_end(path: str, recipes: Path) -> None:
    made: Any = Plan if "compare" in path else Sweep
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(made, as_positional=False)
    values = parser.instantiate(parser.parse_args(["--config", str(recipes / path)])).as_dict()
    values.pop("config")
    (check_plan if made is Plan else check_sweep)(made(**values))
