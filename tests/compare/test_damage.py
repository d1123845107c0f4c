"""A file that is damaged between two runs is named and made again, and the results are those of an undamaged run."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from damage import DAMAGES
from rich.console import Console
from tiny_models import tiny

from lightning_peft.callbacks import ITI, LoRA
from lightning_peft.compare import cell, cost
from lightning_peft.compare import run as running
from lightning_peft.compare.finished import finished
from lightning_peft.compare.page import write_html
from lightning_peft.compare.plan import Plan, Row
from lightning_peft.files.kept import kept
from lightning_peft.files.records import DamagedError
from lightning_peft.truthfulqa import SideEffects, answers_section
from lightning_peft.truthfulqa.answers import Answers
from lightning_peft.truthfulqa.question_records import QuestionRecords
from lightning_peft.truthfulqa.task import TruthfulQA

pytestmark = pytest.mark.filterwarnings("ignore")
RECORDS = QuestionRecords(TruthfulQA("m"))
CELLS = [f"{name}-fold{fold}" for name in ("base", "iti", "lora", "both") for fold in (0, 1)]


@pytest.fixture(autouse=True, scope="module")
def without_clock_and_memory() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (cell, running, cost):
            patch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: 0.0))
        patch.setattr(cost, "_process", lambda _: None)
        yield


@pytest.fixture(scope="module")
def whole(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A finished comparison, whose folder is left as it is."""
    iti = ITI(num_heads=3, alpha=5.0)
    rows = [
        Row("base", "Base", "base"),
        Row("iti", "ITI", "edited", iti),
        Row("lora", "LoRA", "tuned", LoRA(r=2), learning_rates=[0.05], max_epochs=1),
        Row("both", "LoRA + ITI", "stack", iti, after="lora"),
    ]
    effects = SideEffects(tokens=256, capability=2)
    folder, model = tmp_path_factory.mktemp("damage") / "whole", tiny("llama")
    model.config.max_position_embeddings = 1024  # else the report would speak of its window, as a release did not
    model.save_pretrained(folder.with_name("model"))
    tiny_tokenizer.save_pretrained(folder.with_name("model"))
    task = TruthfulQA(str(folder.with_name("model")), limit=12, side_effects=effects, answers=Answers(max_new_tokens=3))
    plan = Plan("x", rows, task, output=str(folder), accelerator="cpu")
    assert "failed" not in again(plan)
    return plan


def again(plan: Plan) -> str:
    """Run it; what it says."""
    console, output = Console(file=io.StringIO(), width=500), Path(str(plan.output))
    settings = {"rows": {row.name: {"name": row.name} for row in plan.rows}}
    write_html(running.run(plan, settings, console), output / "report.html")
    return console.file.getvalue()  # type: ignore[attr-defined]


def copied(plan: Plan, folder: Path) -> Plan:
    shutil.copytree(str(plan.output), folder)
    return Plan(**{**plan.__dict__, "output": str(folder)})


def written(folder: Path) -> dict[str, bytes]:
    """All that a comparison hands over."""
    files = [*folder.glob("*.*"), *folder.glob("samples/*/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if not path.name.startswith(".")}


def files_of(cell: Path) -> list[Path]:
    return sorted(path for path in cell.rglob("*") if path.is_file())


def as_the_release_wrote_it(folder: Path) -> None:
    """Take from every record its sum, and what else that release had not."""
    for path in folder.glob("cells/*/*.json"):
        record = json.loads(path.read_text())
        for name in ("sha256", "files", "texts"):
            record.pop(name, None)
        path.write_text(json.dumps(record) + "\n")


def test_a_finished_comparison_computes_nothing_and_says_the_same(whole: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(Path(str(whole.output)))
    monkeypatch.setattr(running, "run_cell", lambda *_: pytest.fail("a cell was computed"))
    monkeypatch.setattr(answers_section, "_write", lambda *_: pytest.fail("an answer was written"))
    said = again(whole)
    assert "again" not in said and said.count("finished before") == len(CELLS)
    assert before.keys() >= {"results.json", "samples.jsonl", "answers.jsonl", "report.html"}
    assert written(Path(str(whole.output))) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_of_a_cell_is_noticed_and_named(whole: Plan, tmp_path: Path, damage: str) -> None:
    folder = Path(str(copied(whole, tmp_path / "x").output)) / "cells"
    for place in (folder / name for name in CELLS):
        key = json.loads((place / "result.json").read_text())["key"]
        files = [path for path in files_of(place) if path.name != "answers.json"]
        assert len(files) == 3 if place.name.startswith("base") else len(files) >= 6
        for path in files:
            content = path.read_bytes()
            DAMAGES[damage](path)
            with pytest.raises(DamagedError) as caught:
                finished(place, key, RECORDS)
            assert str(path) in str(caught.value)
            path.write_bytes(content)
        assert finished(place, key, RECORDS) is not None


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "flipped"])
def test_cells_of_a_release_without_sums_count_where_they_can_be_read(whole: Plan, tmp_path: Path, damage: str) -> None:
    plan = copied(whole, tmp_path / "x")
    as_the_release_wrote_it(tmp_path / "x")
    assert "again" not in again(plan) and written(tmp_path / "x") == written(Path(str(whole.output)))
    for place in (tmp_path / "x" / "cells" / name for name in CELLS):
        key = json.loads((place / "result.json").read_text())["key"]
        for path in files_of(place):
            if path.name in ("answers.json", "lightning_peft.json", "README.md"):  # nothing of these is needed
                continue
            content = path.read_bytes()
            DAMAGES[damage](path)
            with pytest.raises(DamagedError, match=str(path.parent if "adapter" in str(path) else path)):
                finished(place, key, RECORDS)
            path.write_bytes(content)


@pytest.mark.parametrize("turn", range(2))
def test_a_damaged_comparison_run_again_gives_the_same_and_says_which_files(
    whole: Plan, tmp_path: Path, turn: int
) -> None:
    """In every turn another file of each cell, each damaged in another way."""
    plan, damages, named = copied(whole, tmp_path / "x"), list(DAMAGES.items()), []
    for number, name in enumerate(CELLS):
        files = files_of(tmp_path / "x" / "cells" / name)
        path = files[(3 * turn + number) % len(files)]
        damage, does = damages[(turn + number) % len(damages)]
        does(path)
        if (path.name, damage) != ("answers.json", "deleted"):  # which may never have been asked for
            named.append(str(path))
    said = again(plan).splitlines()
    for path in named:
        assert len([line for line in said if path in line and "again" in line]) == 1, path
    assert written(tmp_path / "x") == written(Path(str(whole.output)))
    assert "again" not in again(plan)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("summed", [True, False])
def test_a_damaged_value_is_made_again(tmp_path: Path, damage: str, summed: bool) -> None:
    path, said, made = tmp_path / "part.json", [], []

    def make() -> list[float]:
        made.append(1)
        return [0.25, 0.5, float("nan")]

    def read() -> Any:
        return kept(path, "key", make, lambda found: isinstance(found, list) and len(found) == 3, said.append)

    first = read()
    if not summed:
        path.write_text(json.dumps({"key": "key", "made": first}) + "\n")
        if damage == "flipped":
            return  # of such a file that cannot be known
    assert repr(read()) == repr(first) and len(made) == 1 and not said
    DAMAGES[damage](path)
    assert repr(read()) == repr(first) and len(made) == 2
    assert [str(path) in sentence for sentence in said] == ([] if damage == "deleted" else [True])
