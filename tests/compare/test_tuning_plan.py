"""The plan of every tuned method forgets none, and treats all alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_peft import callbacks
from lightning_peft.callbacks import AdapterCallback, Edit

PATH = Path(__file__).parents[2] / "configs" / "compare" / "tuning.yaml"
PLAN: dict[str, Any] = yaml.safe_load(PATH.read_text(encoding="utf-8"))

# the reasons stand at the top of the plan
WITHOUT_A_ROW = {"AdapterCallback", "Composite", "PEFT", "PrefixTuning"}


def tuned() -> set[str]:
    exported = {name: getattr(callbacks, name) for name in callbacks.__all__}
    adapting = {n for n, kind in exported.items() if isinstance(kind, type) and issubclass(kind, AdapterCallback)}
    return {name for name in adapting if not issubclass(exported[name], Edit)}


def test_every_tuned_method_has_a_row() -> None:
    named = {row["callback"]["class_path"].rpartition(".")[2] for row in PLAN["rows"]}
    assert tuned() - named == WITHOUT_A_ROW
    assert named - tuned() == {"Callback"}, "the head alone"


@pytest.mark.parametrize("name", sorted(WITHOUT_A_ROW - {"AdapterCallback"}))
def test_a_method_without_a_row_is_named_with_the_reason(name: str) -> None:
    comments = [line for line in PATH.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(name in line for line in comments)


def test_all_rows_have_the_same_steps_and_as_many_trials_a_factor_of_three_apart() -> None:
    settings = {(row["max_steps"], row["epoch_steps"], row["patience"]) for row in PLAN["rows"]}
    assert settings == {(100, 50, 2)}
    for row in PLAN["rows"]:
        low, high = row["learning_rates"]
        assert high == pytest.approx(3 * low)
