"""The commands of docs/worked-example.md are run as the page says, with a tiny model and few directions."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from lightning_peft.cli import main
from lightning_peft.effects import kl, text_slice

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "worked-example.md").read_text(encoding="utf-8")
MODELS = ("models/SmolLM2-135M-Instruct", "models/gemma-3-270m")
TEMPLATE = "{% for m in messages %}Q: {{ m.content }} {% endfor %}A:"

pytestmark = pytest.mark.filterwarnings("ignore")


def commands(beginning: str) -> list[list[str]]:
    blocks = re.findall(r"^```console\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith(beginning)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Callable[[str], Path]) -> Path:
    """A folder with the page's file and the pairs, where a tiny chat model stands in for both models."""
    for name in MODELS:
        shutil.copytree(tiny_folder("llama"), tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(TEMPLATE)
    for title, text in re.findall(r'^```\w+ title="(.+?)"\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE):
        (tmp_path / title).write_text(text, encoding="utf-8")
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "mending.jsonl", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def behaviour(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("behaviour")


def test_there_are_sixty_pairs_and_the_page_shows_one() -> None:
    pairs = [json.loads(line) for line in (ROOT / "docs" / "mending.jsonl").read_text().splitlines()]
    assert len({pair["prompt"] for pair in pairs}) == 60
    words = {side: np.mean([len(pair[side].split()) for pair in pairs]) for side in ("positive", "negative")}
    assert abs(words["positive"] - words["negative"]) < 1.5
    (shown,) = re.findall(r"^```json\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert json.loads(shown) in pairs


def test_the_pages_fit_makes_what_generate_answers_with(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fit,), (generate,) = commands("lightning-peft fit"), commands("lightning-peft generate")
    quiet = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    main([*fit[1:], *quiet])
    saved = torch.load(folder / generate[2], weights_only=True)["state_dict"]
    assert any(bool(tensor.any()) for name, tensor in saved.items() if "layer_offsets" in name)
    capsys.readouterr()
    main(generate[1:])
    said = capsys.readouterr().out
    assert "adapted: " in said and "base: " in said


def test_the_pages_cells_and_report(
    folder: Path, behaviour: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two budgets and a draw: each direction is at the KL asked for, and finished cells are not made again."""
    *cells, report = commands("python benchmarks/behaviour.py")
    few = ["--draws", "1", "--tokens", "64", "--budgets", "0.002", "0.004"]
    for command in cells:
        monkeypatch.setattr(sys, "argv", [*command[1:], *few])
        behaviour.main()
    made = sorted((folder / "docs/results/behaviour/cells").iterdir())
    assert len(made) == 2 * (1 + 2 * 2)
    before = {path: path.stat().st_mtime_ns for path in made}
    behaviour.main()
    assert {path: path.stat().st_mtime_ns for path in made} == before
    for path in made:
        for point in json.loads(path.read_text())["points"]:
            assert point["kl"] == pytest.approx(point["budget"], rel=behaviour.TOLERANCE)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", report[1:])
    behaviour.main()
    assert capsys.readouterr().out.count("| ITI |") == 4
    results = json.loads((folder / "docs/results/behaviour/results.json").read_text())
    assert {row["p"] for row in results["gemma-3-270m"]["rows"]} <= {1 / 2, 1.0}


def test_kl_on_neutral_text_is_that_of_the_package(folder: Path, behaviour: ModuleType) -> None:
    subject = behaviour.Subject(MODELS[0], "docs/mending.jsonl", 64)
    text = text_slice(tokens=24, length=8)  # which the tiny model's window holds
    neutral = behaviour.NeutralText(subject.module, text)
    assert abs(neutral.kl()) < 1e-6
    stack = behaviour.stack_of(subject.backbone)
    stack.put("edit", subject.computed("caa", None))
    stack.scale(3.0, "edit")
    expected = kl(subject.backbone, "edit", text, subject.module.tokenizer)
    assert expected.mean > 1e-3 and neutral.kl() == pytest.approx(expected.mean, rel=1e-3)


def test_shuffled_labels_stay_one_of_each_in_a_pair(behaviour: ModuleType) -> None:
    label, group = torch.tensor([1, 0] * 50), torch.arange(50).repeat_interleave(2)
    drawn = [behaviour.shuffled(label, group, draw) for draw in (0, 1)]
    for labels in drawn:
        assert torch.equal(labels[0::2] + labels[1::2], torch.ones(50, dtype=torch.long))
        assert 10 < int((labels != label).sum()) // 2 < 40
    assert not torch.equal(*drawn) and behaviour.shuffled(label, group, None) is label


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("start", [0.01, 1.0, 300.0])
def test_a_strength_is_found_whatever_the_curve(behaviour: ModuleType, power: float, start: float) -> None:
    tried: dict[float, float] = {}
    for budget in (0.1, 0.25, 0.5):
        alpha, found = behaviour.strength_at(lambda a: min(0.02 * a**power, 8.0), budget, tried, start)
        assert found == tried[alpha] == pytest.approx(budget, rel=behaviour.TOLERANCE)
    assert len(tried) <= 3 * behaviour.MOST_STEPS


def test_a_rank_counts_draws_that_gain_as_much(behaviour: ModuleType) -> None:
    of_model = importlib.import_module("behaviour_report").of_model

    def cell(method: str, draw: int | None, gain: float) -> Mapping[str, object]:
        point = {
            "budget": 0.1,
            "alpha": 1.0,
            "kl": 0.1,
            "wanted": [gain, gain + 1.0, gain],
            "unwanted": [0.0, 0.0, 1.0],
        }
        return {"method": method, "draw": draw, "points": [point]}

    cells = [cell("base", None, 0.0), cell("caa", None, 2.0), *(cell("caa", i, float(i)) for i in range(4))]
    (row,) = of_model(cells)["rows"]
    assert row["gain"]["mean"] == 2.0 and row["p"] == pytest.approx(3 / 5) and row["less_draws"]["mean"] == 0.5
