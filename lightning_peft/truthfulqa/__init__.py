"""The TruthfulQA benchmark: data, prompts, scoring, metrics. It scores whatever adapter is active."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft.truthfulqa.datamodule import TruthfulQADataModule
    from lightning_peft.truthfulqa.embeddings import SentenceEmbedder
    from lightning_peft.truthfulqa.evaluation import Evaluation
    from lightning_peft.truthfulqa.generation import Answer, AnswerGenerator, encode_prompts
    from lightning_peft.truthfulqa.metrics import MC0, MC1, MC2, MC3
    from lightning_peft.truthfulqa.presets import INSTRUCTIONS, Prompting, cut_answer
    from lightning_peft.truthfulqa.prompts import QA_PRIMER
    from lightning_peft.truthfulqa.protocols import PROTOCOLS, Protocol
    from lightning_peft.truthfulqa.questions import Choice, DataError, Question, load_questions
    from lightning_peft.truthfulqa.references import reference_scores
    from lightning_peft.truthfulqa.samples import (
        SampleWriter,
        by_category,
        harness_samples,
        read_samples,
        write_samples,
    )
    from lightning_peft.truthfulqa.scoring import AnswerScorer, ChoiceScorer
    from lightning_peft.truthfulqa.side_effects import SideEffects, TextEffects, batch_effects, forgotten, text_effects
    from lightning_peft.truthfulqa.text import TextSlice, text_slice

_MODULES = {
    "TruthfulQADataModule": "datamodule",
    "SentenceEmbedder": "embeddings",
    "Evaluation": "evaluation",
    "Answer": "generation",
    "AnswerGenerator": "generation",
    "encode_prompts": "generation",
    "MC0": "metrics",
    "MC1": "metrics",
    "MC2": "metrics",
    "MC3": "metrics",
    "INSTRUCTIONS": "presets",
    "Prompting": "presets",
    "cut_answer": "presets",
    "QA_PRIMER": "prompts",
    "PROTOCOLS": "protocols",
    "Protocol": "protocols",
    "Choice": "questions",
    "DataError": "questions",
    "Question": "questions",
    "load_questions": "questions",
    "reference_scores": "references",
    "SampleWriter": "samples",
    "by_category": "samples",
    "harness_samples": "samples",
    "read_samples": "samples",
    "write_samples": "samples",
    "AnswerScorer": "scoring",
    "ChoiceScorer": "scoring",
    "SideEffects": "side_effects",
    "TextEffects": "side_effects",
    "batch_effects": "side_effects",
    "forgotten": "side_effects",
    "text_effects": "side_effects",
    "TextSlice": "text",
    "text_slice": "text",
}

__all__ = [
    "INSTRUCTIONS",
    "MC0",
    "MC1",
    "MC2",
    "MC3",
    "PROTOCOLS",
    "QA_PRIMER",
    "Answer",
    "AnswerGenerator",
    "AnswerScorer",
    "Choice",
    "ChoiceScorer",
    "DataError",
    "Evaluation",
    "Prompting",
    "Protocol",
    "Question",
    "SampleWriter",
    "SentenceEmbedder",
    "SideEffects",
    "TextEffects",
    "TextSlice",
    "TruthfulQADataModule",
    "batch_effects",
    "by_category",
    "cut_answer",
    "encode_prompts",
    "forgotten",
    "harness_samples",
    "load_questions",
    "read_samples",
    "reference_scores",
    "text_effects",
    "text_slice",
    "write_samples",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
