"""What a test measures of each unit is gathered from batches, and from processes."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from lightning_peft.tasks import UnitScores, unit_scores

TRAINER, MODULE = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), L.LightningModule()
Batches = list[dict[str, Any]]


def gathered(batches: Batches) -> UnitScores:
    scores = UnitScores()
    scores.on_test_epoch_start(TRAINER, MODULE)
    for number, outputs in enumerate(batches):
        scores.on_test_batch_end(TRAINER, MODULE, outputs, None, number)
    return scores


def of_processes(monkeypatch: pytest.MonkeyPatch, *processes: Batches) -> dict[str, dict[int, Any]]:
    """Return the columns that the first of some processes has, each of which has tested batches."""
    monkeypatch.setattr(unit_scores, "rank_and_count", lambda: (0, len(processes)))
    parts = [gathered(batches)._here for batches in processes]
    monkeypatch.setattr(unit_scores, "of_all_ranks", lambda _: parts)
    scores = gathered(processes[0])
    scores.on_test_epoch_end(TRAINER, MODULE)
    return scores.columns


def batch(units: list[int], *values: float) -> dict[str, Any]:
    return {"unit": torch.tensor(units), "nll": torch.tensor(values)}


def test_a_unit_comes_again_with_its_values_where_a_sampler_of_several_processes_repeats_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns = of_processes(monkeypatch, [batch([0, 2], 0.5, 1.5)], [batch([1, 0], 1.0, 0.501)])
    assert sorted(columns["nll"]) == [0, 1, 2] and columns["nll"][0] == 0.5


def test_numbers_that_begin_anew_in_each_process_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"^Unit 0 was tested twice in one test: LightningModule.test_step must number"
    ):
        of_processes(monkeypatch, [batch([0, 1], 0.5, 1.5)], [batch([0, 1], 0.7, 1.5)])


def test_a_unit_that_comes_again_on_one_process_is_one_sentence_though_its_values_are_equal() -> None:
    with pytest.raises(ValueError, match=r"^Unit 1 was tested twice in one test"):
        gathered([batch([0, 1], 0.5, 1.5), batch([1, 2], 1.5, 1.0)])


def test_each_test_begins_anew() -> None:
    scores = gathered([batch([0, 1], 0.5, 1.5)])
    scores.on_test_epoch_start(TRAINER, MODULE)
    scores.on_test_batch_end(TRAINER, MODULE, batch([0, 1], 0.6, 1.4), None, 0)
    scores.on_test_epoch_end(TRAINER, MODULE)
    assert scores.columns["nll"] == pytest.approx({0: 0.6, 1: 1.4})


def test_columns_of_texts_lists_and_an_empty_batch_are_gathered() -> None:
    single = {"unit": [torch.tensor(5), np.int64(6)], "answer": ("no", "yes")}
    scores = gathered([{"unit": [3, 4], "answer": ["yes", "no"]}, {"unit": [], "answer": []}, single])
    scores.on_test_epoch_end(TRAINER, MODULE)
    assert scores.columns == {"answer": {3: "yes", 4: "no", 5: "no", 6: "yes"}} and scores.misshapen == {}
