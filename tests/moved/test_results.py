"""A `results.json` from before measures were described in it is shown as it was, to the last character.

`data/reports-2ec00ad.tar.xz` holds what commit 2ec00ad showed, the last that knew one benchmark only: of the comparison
of release 68ae323, and of one with every kind of row, side effects, judged answers, draws and a failure.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from released import unpack
from rich.console import Console
from tuning import ROOT

from lightning_peft.compare.measured import measured_table
from lightning_peft.compare.page import write_html
from lightning_peft.compare.results import completed
from lightning_peft.compare.sections import section_views
from lightning_peft.compare.terminal import table
from lightning_peft.compare.verdict import verdict
from lightning_peft.moved.results import complete

COMPARISONS = ["run", "judged", "unresolved"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    with tarfile.open(ROOT / "tests" / "data" / "reports-2ec00ad.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_terminal_shows_the_same(name: str, reports: Path) -> None:
    results, console = read(reports / name), Console(file=io.StringIO(), width=120)
    console.print(table(results))
    for view in section_views(results):
        console.print(measured_table(view))
    assert console.file.getvalue() == (reports / name / "terminal.txt").read_text()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_verdict_is_the_same(name: str, reports: Path) -> None:
    assert verdict(read(reports / name)) == (reports / name / "verdict.txt").read_text().splitlines()


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_page_is_the_same_but_for_line_breaks_between_tags(name: str, reports: Path, tmp_path: Path) -> None:
    html = unescape(write_html(read(reports / name), tmp_path / "report.html").read_text(encoding="utf-8"))
    html = re.sub(r"data:image[^\"]*", "picture", html)
    before = (reports / name / "page.html").read_text(encoding="utf-8")
    assert re.sub(r">\s+<", "><", html) == re.sub(r">\s+<", "><", before)


def test_the_comparison_is_the_release_s(reports: Path, tmp_path: Path) -> None:
    assert read(reports / "run") == read(unpack("results", tmp_path) / "compare")


def test_results_that_describe_their_measures_are_left_alone(reports: Path) -> None:
    described = completed(read(reports / "judged"))
    assert completed(described) == described
    assert [section["name"] for section in described["sections"]] == ["side_effects", "answers"]
    assert (described["primary"], described["unit"]) == ("mc2", "question")


def test_the_descriptions_are_those_of_the_measures_today() -> None:
    from lightning_peft.truthfulqa.task import MEASURES

    then = complete({"rows": [{"metrics": {"mc1": {}}}]})["measures"]
    described = {name: (m.label, m.meaning, m.better) for name, m in MEASURES.items()}
    assert described == {name: (m["label"], m["meaning"], m["better"]) for name, m in then.items()}


def test_of_unknown_measures_nothing_is_made_up() -> None:
    results = complete({"rows": [{"metrics": {"rmse": {"mean": 3.0}}}]})
    assert (results["measures"], results["primary"]) == ({}, "rmse") and "unit" not in results
    assert complete({"rows": []})["primary"] == "mc2"
