"""The check that is made for a GPU runs in small on a CPU; a part that fails is a row of its table."""

from __future__ import annotations

from typing import Any

import pytest
from tuning import QUIET

from benchmarks import gpu_check
from benchmarks.gpu_check import PARTS, TINY, check

pytestmark = [pytest.mark.filterwarnings(warning) for warning in (*QUIET, "ignore")]


def test_every_part_ends_on_a_small_model() -> None:
    results = check(TINY, list(PARTS), seconds=300)
    assert results.keys() == PARTS.keys()
    assert not [values["error"] for values in results.values() if "error" in values]
    assert results["qlora"]["planned_bytes"] > 0 and results["lora"]["peak_bytes"] is None  # of a GPU alone
    assert results["iti_on_nf4"]["tokens_as_without_cache"] == 1 and results["iti_on_nf4"]["heads"] == 8
    assert results["device_map"]["trained_tensors"] > 0 and results["compiled"]["relative_difference"] < 0.05


def test_a_part_that_fails_stops_no_other_and_none_begins_late(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(shape: Any) -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_check, "PARTS", {"one": broken, "two": lambda shape: {"loss": 1.0}})
    results = check(TINY, ["one", "two"], seconds=60)
    assert results["one"]["error"] == "RuntimeError: no such kernel" and results["two"]["loss"] == 1.0
    assert "skipped" in check(TINY, ["two"], seconds=-1)["two"]
