"""The interface of a judge, and the human judgements that judges are trained on and held against."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from lightning_peft.truthfulqa.questions import DataError

Kind = Literal["truth", "info"]

# what a judge's prompt ends with (TruthfulQA repository, `utilities.format_end2end_prompt`; Apache-2.0)
_ASKS: dict[Kind, str] = {"truth": "True:", "info": "Helpful:"}
_FORM = re.compile(r"Q: (.*?)\nA: (.*)\n(True|Helpful):", re.DOTALL)
_VERDICTS = {" yes": True, " no": False}


@runtime_checkable
class Judge(Protocol):
    """Anything that says how probably each answer is true (or informative)."""

    def score(self, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Return the probability of yes for each answer, `[N]` float32 on the CPU, from 0 to 1."""
        ...


@dataclass(frozen=True)
class Judgement:
    """A person's verdict on one answer.

    Args:
        question: the question.
        answer: a model's or a person's answer.
        kind: what was asked: `"truth"` or `"info"` (does the answer inform?).
        verdict: True is yes.
    """

    question: str
    answer: str
    kind: Kind
    verdict: bool


def judge_prompt(question: str, answer: str, kind: Kind) -> str:
    r"""Return the prompt of a judge; its next token is ` yes` or ` no`.

    Example:
        >>> judge_prompt("Why?", "Because.", "truth")
        'Q: Why?\nA: Because.\nTrue:'
    """
    if kind not in _ASKS:
        raise ValueError(f'A judge\'s kind is "truth" or "info", got {kind!r}.')
    return f"Q: {question}\nA: {answer}\n{_ASKS[kind]}"


def load_judgements(path: str | Path) -> list[Judgement]:
    """Read `finetune_truth.jsonl` or `finetune_info.jsonl` of the TruthfulQA repository, each judgement once.

    Args:
        path: a file with an object a line: `prompt`, as `judge_prompt` makes it, and `completion`, ` yes` or ` no`.

    Raises:
        DataError: the file is missing, or a line is not of this form; with file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is not a file: name finetune_truth.jsonl or finetune_info.jsonl.")
    judgements: dict[Judgement, None] = {}  # a fifth of the lines stand there more than once
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                judgements[_judgement(line, f"{path}, line {number}")] = None
    if not judgements:
        raise DataError(f"{path} holds no judgement.")
    return list(judgements)


def split_by_question(
    judgements: Iterable[Judgement], test_fraction: float = 0.2, val_fraction: float = 0.1, seed: int = 0
) -> tuple[list[Judgement], list[Judgement], list[Judgement]]:
    """Split judgements into training, validation and test; all judgements on one question go to one of them.

    Args:
        judgements: all of them, in any order.
        test_fraction: share of the questions that are tested.
        val_fraction: share of the questions that are validated.
        seed: of the draw. The same questions with the same seed are split the same way, truth and info alike.

    Raises:
        ValueError: a part would have no question.
    """
    judgements = list(judgements)
    questions = sorted({_normal(judgement.question) for judgement in judgements})
    test, val = round(test_fraction * len(questions)), round(val_fraction * len(questions))
    if min(test, val, len(questions) - test - val) < 1:
        raise ValueError(
            f"{len(questions)} questions cannot be split with test_fraction {test_fraction} and val_fraction "
            f"{val_fraction}: each part needs a question."
        )
    random.Random(seed).shuffle(questions)
    tested, validated = set(questions[:test]), set(questions[test : test + val])
    parts: tuple[list[Judgement], ...] = ([], [], [])
    for judgement in judgements:
        normal = _normal(judgement.question)
        parts[2 if normal in tested else 1 if normal in validated else 0].append(judgement)
    return parts[0], parts[1], parts[2]


def _judgement(line: str, where: str) -> Judgement:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not complete JSON ({error.msg}).") from error
    form = _FORM.fullmatch(row["prompt"]) if isinstance(row, dict) and isinstance(row.get("prompt"), str) else None
    if form is None:
        raise DataError(f"{where}: 'prompt' must be 'Q: …\\nA: …\\nTrue:' (or 'Helpful:').")
    if row.get("completion") not in _VERDICTS:
        raise DataError(f"{where}: 'completion' must be ' yes' or ' no', got {row.get('completion')!r}.")
    return Judgement(form[1], form[2], "truth" if form[3] == "True" else "info", _VERDICTS[row["completion"]])


def _normal(question: str) -> str:
    return " ".join(question.split()).casefold()
