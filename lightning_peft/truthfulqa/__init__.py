"""The TruthfulQA benchmark: data, prompts, scoring, metrics. It scores whatever adapter is active."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft.truthfulqa.datamodule import TruthfulQADataModule
    from lightning_peft.truthfulqa.metrics import MC0, MC1, MC2, MC3
    from lightning_peft.truthfulqa.prompts import QA_PRIMER
    from lightning_peft.truthfulqa.questions import Choice, DataError, Question, load_questions
    from lightning_peft.truthfulqa.scoring import ChoiceScorer

_MODULES = {
    "TruthfulQADataModule": "datamodule",
    "MC0": "metrics",
    "MC1": "metrics",
    "MC2": "metrics",
    "MC3": "metrics",
    "QA_PRIMER": "prompts",
    "Choice": "questions",
    "DataError": "questions",
    "Question": "questions",
    "load_questions": "questions",
    "ChoiceScorer": "scoring",
}

__all__ = [
    "MC0",
    "MC1",
    "MC2",
    "MC3",
    "QA_PRIMER",
    "Choice",
    "ChoiceScorer",
    "DataError",
    "Question",
    "TruthfulQADataModule",
    "load_questions",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
