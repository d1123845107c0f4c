"""The tasks of docs/tasks.md are compared as the page says, in small: files by the command, other code as it is."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import vision
import yaml
from PIL import Image
from rich.console import Console

from lightning_peft.cli import main
from lightning_peft.compare import statistics
from lightning_peft.compare.columns import COLUMNS
from lightning_peft.compare.terminal import table

PAGE = Path(__file__).parents[1] / "docs" / "tasks.md"
Results = dict[str, Any]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the page's files, in which commands are given."""
    for title, text in re.findall(r'^```\w+ title="(.+?)"\n(.*?)^```', PAGE.read_text(), re.DOTALL | re.MULTILINE):
        (tmp_path / title).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for name in ("function_interval", "function_difference"):  # 2,000 resamples take a minute
        monkeypatch.setattr(statistics, name, partial(getattr(statistics, name), resamples=40))
    importlib.invalidate_caches()
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def compare(monkeypatch: pytest.MonkeyPatch, plan: str, *options: str, max_epochs: int) -> Results:
    """Give the command as a shell does, with one learning rate a row; return what `results.json` has."""
    settings = yaml.safe_load(Path(plan).read_text())
    for row in settings["rows"]:
        if "learning_rates" in row:
            row |= {"learning_rates": row["learning_rates"][:1], "max_epochs": max_epochs}
    Path(plan).write_text(yaml.safe_dump(settings | {"accelerator": "cpu"}))
    monkeypatch.setattr(sys, "argv", ["lightning-peft", "compare", "--config", plan, *options])
    with redirect_stdout(io.StringIO()):
        main()
    results: Results = yaml.safe_load((Path("runs") / settings["name"] / "results.json").read_text())
    assert not any(row["failed"] for row in results["rows"])
    return results


def values(results: Results, measure: str) -> dict[str, float]:
    return {row["method"]: row["metrics"][measure]["mean"] for row in results["rows"]}


def write_csv(path: str, names: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


def test_digits_are_compared_by_scores_of_units_and_by_functions_of_all_predictions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = compare(monkeypatch, "digits.yaml", max_epochs=10)
    accuracy, nll = values(results, "accuracy"), values(results, "nll")
    assert accuracy["lora"] > accuracy["head"] + 0.1 and nll["lora"] < nll["head"] - 0.2
    assert results["data"]["units"] == 300 and results["primary"] == "accuracy"
    head, _, lora = results["rows"]
    assert head["difference"] is None and head["trainable_parameters"] == 64 * 5 + 5
    for name in ("accuracy", "nll", "f1", "mcc"):
        assert lora["metrics"][name]["low"] < lora["metrics"][name]["mean"] < lora["metrics"][name]["high"]
        assert lora["difference"][name]["low"] * lora["difference"][name]["high"] > 0
    assert lora["difference"]["mcc"]["mde"] is None and lora["difference"]["nll"]["mde"] > 0


def test_digits_are_compared_from_python_with_a_column_and_a_table_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("lightning_peft.compare.columns.COLUMNS", [*COLUMNS])
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    for block in blocks:
        block = block.replace('"max_epochs": 20', '"max_epochs": 1').replace("Digits", "DigitsInBits")
        exec(compile(block.replace("digits_task", "digits_in_bits"), PAGE.name, "exec"), names)
    console = Console(width=140, file=io.StringIO())
    console.print(table(names["results"]))
    assert re.search(r"Lower is better: NLL", console.file.getvalue()) and "0.01 0.01" in console.file.getvalue()
    (section,) = names["results"]["sections"]
    assert section["title"] == "Surprise"
    bits, nll = (values(names["results"], name)["head"] for name in ("bits", "nll"))
    assert bits == pytest.approx(nll / 0.693147, rel=1e-5)


def test_a_folder_of_images_is_compared_with_a_model_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    vision.libraries()
    for number in range(12):
        for kind, color in (("dark", 20), ("light", 200)):
            path = Path("my-images", kind, f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 24), (color + number, color, color)).save(path)
    options = ("--task.folder", "my-images", "--task.model", "test_vit", "--task.pretrained", "false")
    results = compare(monkeypatch, "images.yaml", *options, max_epochs=1)
    assert results["data"]["units"] == 24 and results["unit"] == "image"
    trained = {row["method"]: row["trainable_parameters"] for row in results["rows"]}
    assert trained["head"] == 64 * 2 + 2 and trained["head"] < trained["bitfit"] and trained["head"] < trained["lora"]


def test_texts_of_a_csv_are_compared(monkeypatch: pytest.MonkeyPatch, tiny_folder: Callable[[str], Path]) -> None:
    kinds = {"good": "It is true", "bad": "Who is he?"}
    rows = [(f"{text} {'A' * (number % 3)}", label) for number in range(8) for label, text in kinds.items()]
    write_csv("reviews.csv", ("text", "label"), rows)
    results = compare(monkeypatch, "texts.yaml", "--task.model", str(tiny_folder("bert")), max_epochs=2)
    assert results["data"]["units"] == 16 and all(0 <= value <= 1 for value in values(results, "accuracy").values())
    nll = values(results, "nll")
    assert nll["lora"] != nll["head"]


def test_demonstrations_are_refused_by_a_task_that_has_none(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Callable[[str], Path]
) -> None:
    write_csv("reviews.csv", ("text", "label"), [("It is", "good"), ("Who is", "bad")] * 2)
    plan = yaml.safe_load(Path("texts.yaml").read_text())
    plan["rows"][0]["few_shot"] = 4
    Path("texts.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(SystemExit, match=r"sets few_shot, which Texts\.data does not take"):
        compare(monkeypatch, "texts.yaml", "--task.model", str(tiny_folder("bert")), max_epochs=1)
    assert not Path("runs", "texts", "cells").exists()


def test_choices_are_compared_under_tuning_and_edits(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Callable[[str], Path]
) -> None:
    rows = [(f"Is it {'false ' * number}?", "It is true.", "It is not.") for number in range(12)]
    write_csv("questions.csv", ("question", "wanted", "unwanted"), rows)
    results = compare(monkeypatch, "choices.yaml", "--task.model", str(tiny_folder("llama")), max_epochs=1)
    surprise = values(results, "surprise")
    assert results["data"]["units"] == 12 and len(set(surprise.values())) == 5 and surprise["lora"] < surprise["base"]
    chosen = {row["method"]: row["chosen"] for row in results["rows"]}["iti"]["alpha"]
    assert len(chosen) == 2 and set(chosen) <= {1.0, 5.0, 15.0}


def test_choices_are_swept(monkeypatch: pytest.MonkeyPatch, tiny_folder: Callable[[str], Path]) -> None:
    rows = [(f"Is it {'false ' * number}?", "It is true.", "It is not.") for number in range(12)]
    write_csv("questions.csv", ("question", "wanted", "unwanted"), rows)
    (command,) = re.findall(r"^lightning-peft sweep .*?[^\\\\]$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    command = command.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_folder("llama"))).replace("[4,16]", "[2]")
    monkeypatch.setattr(
        sys, "argv", [*shlex.split(command.replace("\\\n", " ")), "--kl_tokens", "0", "--device", "cpu"]
    )
    with redirect_stdout(io.StringIO()):
        main()
    results = json.loads(Path("runs", "choices-sweep", "results.json").read_text())
    assert len(results["points"]) == 3 and results["points"][0]["metrics"].keys() == {"wanted", "surprise"}
