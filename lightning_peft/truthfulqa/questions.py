"""Questions with their true and false answers, from the hub, a folder of any release, or this package's own set."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_peft.files.data_error import DataError

OWN_SET = Path(__file__).with_name("questions.csv")
_COLUMNS = ("Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers")
_BETWEEN = re.compile(r"[\s,]*")  # the entries of a JSON list
_BINARY_COLUMN = "Best Incorrect Answer"  # since the release of January 2025


@dataclass(frozen=True)
class Choice:
    """One answer, and what it is to each metric: 1 true, 0 false, -1 not among that metric's choices."""

    text: str
    mc0: int
    mc1: int
    mc2: int


@dataclass(frozen=True)
class Question:
    """One question.

    Args:
        id: its row in the release, from 0.
        text: the question.
        category: as in the CSV; `"unknown"` where the release has none.
        choices: the distinct answers over all metrics, in the file's order.
        best: the best true answer.
        correct: the true reference answers.
        incorrect: the false reference answers.
    """

    id: int
    text: str
    category: str
    choices: tuple[Choice, ...]
    best: str
    correct: tuple[str, ...]
    incorrect: tuple[str, ...]


def load_questions(source: str | Path = "hub") -> list[Question]:
    """Load a question set.

    Args:
        source: `"hub"` (TruthfulQA's 817 questions from the Hugging Face hub), `"package"` (this package's own
            questions, which are not TruthfulQA), a folder with `mc_task.json` and/or `TruthfulQA.csv`, or one of
            these files. Choices come from `mc_task.json` where it is there, categories from the CSV beside it.

    Raises:
        DataError: the file is missing, unreadable or incomplete, with file and line.

    Example:
        >>> len(load_questions("package")) >= 200
        True
    """
    if source == "hub":
        return _from_hub()
    if source == "package":
        return _from_csv(OWN_SET)
    path = Path(source)
    if path.is_dir():
        task, table = path / "mc_task.json", path / "TruthfulQA.csv"
    elif path.suffix == ".json":
        task, table = path, path.with_name("TruthfulQA.csv")
    else:
        task, table = path.with_suffix(".none"), path
    if path.suffix == ".json" and not path.exists():
        raise DataError(f"{path} does not exist.")  # never the CSV beside it instead, unasked
    if task.is_file():
        references = {_normal(q.text): q for q in _from_csv(table)} if table.is_file() else {}
        return _from_task(task, references)
    if table.is_file():
        return _from_csv(table)
    raise DataError(f"{path} is neither a question file nor a folder with mc_task.json or TruthfulQA.csv.")


def data_hash(questions: Iterable[Question]) -> str:
    """Return the SHA-256 of everything in the questions."""
    text = json.dumps([asdict(question) for question in questions], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def subset(questions: Sequence[Question], limit: int, seed: int = 0) -> list[Question]:
    """Draw `limit` questions with the seed, each category in proportion, in the release's order."""
    if not 1 <= limit <= len(questions):
        raise ValueError(f"limit is {limit}, but there are {len(questions)} questions.")
    by_category: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_category[question.category].append(question)
    # each question's place in its shuffled category, as a share of the category: the smallest shares are taken
    shares = []
    for members in by_category.values():
        shuffled = sorted(members, key=lambda q: hashlib.sha256(f"{seed} {q.text}".encode()).hexdigest())
        shares += [((place + 0.5) / len(shuffled), question.id, question) for place, question in enumerate(shuffled)]
    chosen = [question for _, _, question in sorted(shares, key=lambda item: item[:2])[:limit]]
    return sorted(chosen, key=lambda question: question.id)


def _from_csv(path: Path) -> list[Question]:
    questions: list[Question] = []
    seen: dict[str, int] = {}
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise DataError(f"{path}, line 1: there is no column {missing[0]!r}.")
        for row in reader:
            questions.append(_csv_question(row, len(questions), f"{path}, line {reader.line_num}", seen))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: not complete CSV ({error}).") from error
    if not questions:
        raise DataError(f"{path} holds no question.")
    return questions


def _csv_question(row: Mapping[str, str | None], number: int, where: str, seen: dict[str, int]) -> Question:
    fields = {column: (row.get(column) or "").strip() for column in (*_COLUMNS, _BINARY_COLUMN)}
    for column in _COLUMNS[1:]:
        if not fields[column]:
            raise DataError(f"{where}: {column!r} is empty.")
    _check_new(fields["Question"], where, number, seen)
    best = as_sentence(fields["Best Answer"])
    correct = list(dict.fromkeys([best, *_answers(fields["Correct Answers"])]))
    incorrect = _answers(fields["Incorrect Answers"])
    mc1 = {best: 1} | dict.fromkeys(incorrect, 0)
    mc2 = dict.fromkeys(correct, 1) | dict.fromkeys(incorrect, 0)
    mc0 = {best: 1, as_sentence(fields[_BINARY_COLUMN]): 0} if fields[_BINARY_COLUMN] else {}
    category = fields["Category"] or "unknown"
    for labels in (mc1, mc2, mc0) if mc0 else (mc1, mc2):
        _check_sides(labels, where)
    return _question(number, fields["Question"], category, (mc0, mc1, mc2), best, correct, incorrect)


def _from_task(path: Path, references: Mapping[str, Question]) -> list[Question]:
    text = _text(path)
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not complete JSON ({error.msg}).") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} must hold a list of questions.")
    questions: list[Question] = []
    seen: dict[str, int] = {}
    empty: list[int] = []  # the line of each empty choice's question
    for number, (entry, line) in enumerate(zip(entries, _lines(text), strict=True)):
        where = f"{path}, line {line}, question {number}"
        for key in ("question", "mc1_targets", "mc2_targets"):
            if not isinstance(entry, dict) or not entry.get(key):
                raise DataError(f"{where}: {key!r} is missing or empty.")
        if not isinstance(entry["question"], str) or not entry["question"].strip():
            raise DataError(f"{where}: 'question' must be a text, got {entry['question']!r}.")
        targets = tuple(_labels(entry.get(f"mc{i}_targets", {}), f"{where}, mc{i}_targets") for i in range(3))
        empty += [line for labels in targets for text in labels if not text.strip()]
        targets = tuple({t: truth for t, truth in labels.items() if t.strip()} for labels in targets)
        for i, labels in enumerate(targets):
            if labels or i:  # only mc0 may be absent
                _check_sides(labels, f"{where}, mc{i}_targets")
        _check_new(entry["question"], where, number, seen)
        reference = references.get(_normal(entry["question"]))
        correct = [text for text, truth in targets[2].items() if truth]
        incorrect = [text for text, truth in targets[2].items() if not truth]
        best = next(text for text, truth in targets[1].items() if truth)
        category = "unknown" if reference is None else reference.category
        questions.append(_question(number, entry["question"], category, targets, best, correct, incorrect))
    if empty:  # as the release of January 2025 has them: without a token there is no log-probability
        warnings.warn(f"{path}, from line {empty[0]} on: {len(empty)} empty choices are left out.", stacklevel=3)
    return questions


def _lines(text: str) -> Iterator[int]:
    """Yield the line on which each entry of a JSON list begins."""
    place, line, decode = text.index("[") + 1, 1, json.JSONDecoder().raw_decode
    counted = 0
    while (gap := _BETWEEN.match(text, place)) and (begin := gap.end()) < len(text) and text[begin] != "]":
        line, counted = line + text.count("\n", counted, begin), begin
        yield line
        _, place = decode(text, begin)


def _text(path: Path) -> str:
    """Read a file's text."""
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    data = path.read_bytes()
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line} is not UTF-8 text: byte {error.start} cannot be read.") from error


def _labels(targets: Any, where: str) -> dict[str, int]:
    if not isinstance(targets, dict):
        raise DataError(f"{where} must map each choice to 0 or 1.")
    for text, truth in targets.items():
        if truth not in (0, 1):
            raise DataError(f"{where}: {text!r} is labelled {truth!r}, not 0 or 1.")
    return targets


def _check_sides(labels: Mapping[str, int], where: str) -> None:
    if set(labels.values()) != {0, 1}:
        raise DataError(f"{where} needs a true and a false choice.")


def _from_hub() -> list[Question]:
    from datasets import load_dataset

    try:
        choices = load_dataset("truthfulqa/truthful_qa", "multiple_choice", split="validation")
        answers = load_dataset("truthfulqa/truthful_qa", "generation", split="validation")
    except Exception as error:  # the library raises a dozen kinds for the one fact that matters
        raise DataError(
            "TruthfulQA could not be had from the Hugging Face hub; name a folder with mc_task.json or "
            f'TruthfulQA.csv, or use source="package" ({type(error).__name__}).'
        ) from error
    categories = {_normal(row["question"]): row["category"] for row in answers}
    questions = []
    for number, row in enumerate(choices):
        mc1, mc2 = (
            dict(zip(row[f"mc{i}_targets"]["choices"], row[f"mc{i}_targets"]["labels"], strict=True)) for i in (1, 2)
        )
        category = categories.get(_normal(row["question"]), "unknown")
        correct = [text for text, truth in mc2.items() if truth]
        incorrect = [text for text, truth in mc2.items() if not truth]
        best = next(text for text, truth in mc1.items() if truth)
        questions.append(_question(number, row["question"], category, ({}, mc1, mc2), best, correct, incorrect))
    return questions


def _question(
    number: int,
    text: str,
    category: str,
    targets: tuple[Mapping[str, int], ...],
    best: str,
    correct: Sequence[str],
    incorrect: Sequence[str],
) -> Question:
    mc0, mc1, mc2 = targets
    texts = dict.fromkeys([*mc1, *mc2, *mc0])
    choices = tuple(Choice(t, mc0.get(t, -1), mc1.get(t, -1), mc2.get(t, -1)) for t in texts)
    return Question(number, text.strip(), category, choices, best, tuple(correct), tuple(incorrect))


def _check_new(question: str, where: str, number: int, seen: dict[str, int]) -> None:
    normal = _normal(question)
    if normal in seen:
        raise DataError(f"{where}: the question of row {seen[normal]} stands here again: {question!r}.")
    seen[normal] = number


def _answers(field: str) -> list[str]:
    """Return the answers of a `;`-separated field, each once, as sentences."""
    return list(dict.fromkeys(as_sentence(part) for part in field.split(";") if part.strip()))


def as_sentence(answer: str) -> str:
    """Return an answer with a full stop at its end, as the multiple-choice files have it."""
    answer = answer.strip()
    return answer if answer.endswith(".") else answer + "."


def _normal(question: str) -> str:
    return " ".join(question.split()).casefold()
