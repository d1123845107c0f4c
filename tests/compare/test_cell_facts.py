"""What every finished cell says beside its scores, from one list; a fact that came later unmakes no finished cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from lightning_peft.compare import cell_facts, finished
from lightning_peft.compare.cell_facts import CELL_FACTS, CellFact, row_facts, unknown_facts
from lightning_peft.tasks.cell_records import CellRecords
from lightning_peft.tasks.measure import Measure
from lightning_peft.tasks.task import Task

MEMORY = CellFact("peak_bytes", int, max, later=True)


class Nothing(Task):
    measures: ClassVar[dict[str, Measure]] = {}

    def module(self) -> Any:
        raise NotImplementedError

    def data(self, split: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def _a_later_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_facts, "CELL_FACTS", (*CELL_FACTS, MEMORY))
    monkeypatch.setattr(finished, "_KINDS", {**finished._KINDS, MEMORY.name: int})
    monkeypatch.setattr(finished, "_LATER", {MEMORY.name})


def written(folder: Path) -> CellRecords:
    records = CellRecords(Nothing())
    result = {"key": "k", "failed": None, "chosen": {}, "columns": {}, **unknown_facts()}
    finished.write_result(folder, result, records)
    return records


def test_a_row_has_what_its_cells_make_of_a_fact_together() -> None:
    cells = [unknown_facts() | {"seconds": 1.5, "adapter_bytes": 3}, unknown_facts() | {"seconds": 2.0}]
    assert row_facts(cells) == unknown_facts() | {"seconds": 3.5, "adapter_bytes": 3}


def test_a_cell_finished_before_a_fact_was_known_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = written(tmp_path)
    monkeypatch.setattr(cell_facts, "CELL_FACTS", (*CELL_FACTS, MEMORY))
    monkeypatch.setattr(finished, "_KINDS", {**finished._KINDS, MEMORY.name: int})
    with pytest.raises(finished.DamagedError, match="holds"):
        finished.finished(tmp_path, "k", records)
    monkeypatch.setattr(finished, "_LATER", {MEMORY.name})
    result = finished.finished(tmp_path, "k", records)
    assert result is not None and MEMORY.name not in row_facts([result])


@pytest.mark.usefixtures("_a_later_fact")
def test_a_cell_that_has_it_keeps_it(tmp_path: Path) -> None:
    records = written(tmp_path)
    result = finished.finished(tmp_path, "k", records)
    assert result is not None and row_facts([result | {MEMORY.name: 7}])[MEMORY.name] == 7
