"""Columns beside the measures: one list, from which terminal and page are made."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_peft.compare.columns import COLUMNS, Column, register_column, shown_columns
from lightning_peft.compare.page import write_html
from lightning_peft.compare.terminal import table
from lightning_peft.compare.writing import size


@pytest.fixture
def results() -> dict[str, Any]:
    rows = [
        {"method": "base", "label": "Base", "kind": "base", "metrics": {"f1": {"mean": 0.5, "low": 0.4, "high": 0.6}}},
        {"method": "lora", "label": "LoRA", "kind": "tuned", "peak_bytes": 1_780_000, "metrics": {}},
    ]
    rows[1] |= {"trainable_parameters": 1234, "adapter_bytes": 4936, "seconds": 12.0}
    measures = {"f1": {"label": "F1", "better": 1}}
    return {"name": "x", "data": {}, "model": {"pretrained": "m"}, "measures": measures, "rows": rows}


@pytest.fixture
def _columns() -> Iterator[None]:
    before = list(COLUMNS)
    yield
    COLUMNS[:] = before


def headings(results: dict[str, Any]) -> list[str]:
    return [str(column.header) for column in table(results).columns]


def test_parameters_are_one_column_of_the_terminal_and_two_of_the_page(results: dict[str, Any]) -> None:
    terminal, page = (shown_columns(results, where) for where in ("terminal", "page"))
    assert [c["heading"] for c in terminal] == ["Parameters", "Adapter", "Seconds"]
    assert [c["heading"] for c in page] == ["Trained\nparameters", "Edited\nparameters", "Adapter", "Seconds"]
    assert [c["cells"] for c in terminal] == [["-", "1,234\ntrained"], ["-", "4.94 kB"], ["-", "12"]]


@pytest.mark.usefixtures("_columns")
def test_a_column_of_ones_own_is_in_the_terminal_and_on_the_page(results: dict[str, Any], tmp_path: Path) -> None:
    memory = Column("memory", "Peak\nmemory", lambda row: size(row["peak_bytes"]) if "peak_bytes" in row else "")
    assert register_column(memory) is register_column(memory)
    console = Console(file=io.StringIO(), width=120)
    console.print(table(results))
    assert headings(results)[-1] == "Peak\nmemory" and "1.78 MB" in console.file.getvalue()  # type: ignore[attr-defined]
    page = write_html(results, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<th>Peak<br>memory</th>" in page and page.count("1.78 MB") == 1


@pytest.mark.usefixtures("_columns")
def test_a_column_of_which_no_row_has_anything_is_left_out(results: dict[str, Any]) -> None:
    before = headings(results)
    register_column(Column("joules", "Joules", lambda row: row.get("joules", "")))
    assert headings(results) == before
    results["rows"][0]["joules"] = "3"
    assert headings(results) == [*before, "Joules"] and shown_columns(results, "page")[-1]["cells"] == ["3", "-"]


@pytest.mark.usefixtures("_columns")
def test_two_columns_of_one_name_are_refused(results: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="There is a column 'seconds' already: give yours another name"):
        register_column(Column("seconds", "Seconds", lambda row: ""))
