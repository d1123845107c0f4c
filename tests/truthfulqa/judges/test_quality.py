"""A judge's figures are those of the definitions, worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from damage import DAMAGES
from torch import Tensor

from lightning_peft.truthfulqa import DataError
from lightning_peft.truthfulqa.judges import Confusion, Judgement, judge_quality, load_quality, save_quality


class Fixed:
    """A judge whose probabilities are given."""

    def __init__(self, *scores: float) -> None:
        self.scores = torch.tensor(scores)

    def score(self, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        return self.scores


ROWS = [
    Judgement("a", "1", "truth", True),
    Judgement("a", "2", "truth", False),
    Judgement("b", "3", "truth", True),
    Judgement("b", "4", "truth", True),
]


def test_every_figure_is_the_one_worked_out_by_hand() -> None:
    quality = judge_quality(Fixed(0.9, 0.6, 0.7, 0.2), ROWS)
    assert quality.judgements == 4 and quality.questions == 2
    assert quality.accuracy == 0.5 and quality.majority == 0.75
    assert quality.auroc == pytest.approx(2 / 3)  # .9 and .7 stand above .6, .2 does not
    assert quality.brier == pytest.approx((0.01 + 0.36 + 0.09 + 0.64) / 4)
    assert quality.ece == pytest.approx((0.1 + 0.6 + 0.3 + 0.8) / 4)  # each alone in its bin
    assert quality.confusion == Confusion(((1, 1, 0, 0), (1, 0, 0, 1)))
    assert quality.confusion.sensitivity == pytest.approx(2 / 3) and quality.confusion.specificity == 0.0


def test_a_perfect_judge_is_perfect() -> None:
    quality = judge_quality(Fixed(1.0, 0.0, 1.0, 1.0), ROWS)
    assert (quality.accuracy, quality.auroc, quality.ece, quality.brier) == (1.0, 1.0, 0.0, 0.0)


def test_a_judge_that_always_says_the_commoner_verdict_is_as_good_as_the_majority() -> None:
    quality = judge_quality(Fixed(0.75, 0.75, 0.75, 0.75), ROWS)
    assert quality.accuracy == quality.majority and quality.auroc == 0.5 and quality.ece == pytest.approx(0.0)


@pytest.mark.parametrize("rows", [[], ROWS[:1], [ROWS[0], replace(ROWS[1], kind="info")]])
def test_what_a_judge_is_held_against_must_be_of_one_kind_with_both_verdicts(rows: list[Judgement]) -> None:
    with pytest.raises(ValueError, match="judgements of one kind"):
        judge_quality(Fixed(*[0.5] * len(rows)), rows)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    quality = judge_quality(Fixed(0.9, 0.6, 0.7, 0.2), ROWS)
    save_quality(quality, tmp_path)
    assert load_quality(tmp_path) == quality and [p.name for p in tmp_path.iterdir()] == ["judge.json"]


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"confusion": {"counts": [[1, 2]]}}'])
def test_a_file_that_is_not_a_judges_is_an_error(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "judge.json").write_text(text)
    with pytest.raises(DataError, match=r"judge\.json.*lightning-peft judge"):
        load_quality(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = save_quality(judge_quality(Fixed(0.9, 0.6, 0.7, 0.2), ROWS), tmp_path)
    DAMAGES[damage](path)
    with pytest.raises(DataError, match=rf"{path} .*`lightning-peft judge`"):
        load_quality(tmp_path)


def test_a_file_of_a_release_without_sums_is_read(tmp_path: Path) -> None:
    quality = judge_quality(Fixed(0.9, 0.6, 0.7, 0.2), ROWS)
    (tmp_path / "judge.json").write_text(json.dumps(asdict(quality), indent=1) + "\n")
    assert load_quality(tmp_path) == quality
