"""The harness's own tasks on a real model: an exported LoRA, an edit and a baked model give our scorers' numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tuning import QUIET

from benchmarks.harness_client import compare, make_folders, write_tasks
from lightning_peft.truthfulqa import load_questions

pytestmark = [
    *(pytest.mark.filterwarnings(warning) for warning in QUIET),
    pytest.mark.usefixtures("all_threads"),
    pytest.mark.real_model,
    pytest.mark.slow,
]


def test_choices_and_answers_of_three_kinds_of_folder(smollm2: Path, tmp_path: Path) -> None:
    questions = load_questions("package")[:3]
    write_tasks(questions, tmp_path)
    for arguments in make_folders(str(smollm2), questions, tmp_path).values():
        compared = compare(arguments, questions, tmp_path)
        assert compared["apart"] < 1e-3 and compared["same"] == compared["answers"] == 3
