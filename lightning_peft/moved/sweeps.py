"""Sweeps of 0.1: what their results and their finished parts did not say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_peft.moved import resolve

_TASK = "lightning_peft.truthfulqa.task.TruthfulQA"
_MEASURES = ("mc0", "mc1", "mc2")
_LATER = {"mc3": "mc2"}  # a measure that 0.1 did not make, and the one whose choices are its own


def completed(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the content of a sweep's `results.json` with its measures, the primary one and the unit."""
    if "measures" in results:
        return results
    measures = {
        name: {"label": name.upper(), "meaning": "", "better": 1, "range": (0, 1), "written": ""} for name in _MEASURES
    }
    return {**results, "measures": measures, "primary": "mc2", "unit": "question"}


def incomplete(rows: Iterable[Mapping[str, float]]) -> set[str]:
    """Return the measures that some units were not measured by, for 0.1 had measured them.

    Args:
        rows: the scores of each unit by measure.
    """
    return {later for row in rows for later, there in _LATER.items() if there in row and later not in row}


def key_before(task: Any) -> tuple[dict[str, Any], str] | None:
    """Return the settings and the hash by which 0.1 knew this task, so that its finished parts still count.

    Returns:
        None of a task that there was not, or whose ties it counted otherwise.
    """
    if type(task) is not resolve(_TASK) or task.protocol == "lm_eval":  # a subclass may do otherwise
        return None
    return {"model": task.model, "dtype": task.dtype, "data": task.settings()}, task.data_hash()
