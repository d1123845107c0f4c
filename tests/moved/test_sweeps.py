"""What sweeps of 0.1 did not write is filled in."""

from __future__ import annotations

import pytest

from lightning_peft.moved.sweeps import completed, incomplete, key_before
from lightning_peft.truthfulqa import SideEffects
from lightning_peft.truthfulqa.settings import Data
from lightning_peft.truthfulqa.task import TruthfulQA


def test_results_without_measures_are_of_three() -> None:
    whole = completed({"choose": "mc1", "points": []})
    assert {name: measure["label"] for name, measure in whole["measures"].items()} == {
        "mc0": "MC0",
        "mc1": "MC1",
        "mc2": "MC2",
    }
    assert (whole["primary"], whole["unit"], whole["choose"]) == ("mc2", "question", "mc1")


def test_results_with_measures_stay_as_they_are() -> None:
    results = {"measures": {"accuracy": {}}, "primary": "accuracy", "unit": "image"}
    assert completed(results) is results


def test_a_measure_that_some_questions_lack_since_they_were_measured_before_is_incomplete() -> None:
    before, now, without = {"mc1": 1.0, "mc2": 0.5}, {"mc1": 1.0, "mc2": 0.5, "mc3": 1.0}, {"mc1": 1.0}
    assert incomplete([now, before]) == {"mc3"}
    assert incomplete([now, without]) == incomplete([]) == set(), "it has no choices for either"


@pytest.mark.parametrize("fit_window", [False, True])
def test_a_task_is_hashed_as_the_plan_that_it_was(fit_window: bool) -> None:
    data = Data(limit=7, num_folds=3, val_fraction=0.4, seed=2, side_effects=SideEffects(tokens=0))
    data.fit_window = fit_window
    task = data.task("m", dtype="float16")
    settings = {"model": "m", "dtype": "float16", "data": data.settings()}
    assert key_before(task) == (settings, task.data_hash())


def test_a_task_that_there_was_not_or_that_counted_ties_otherwise_is_hashed_as_any_other() -> None:
    class Changed(TruthfulQA):
        """Of which 0.1 knew nothing."""

    assert key_before(Changed("m")) is None
    assert key_before(TruthfulQA("m", protocol="lm_eval")) is None
