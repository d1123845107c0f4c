"""The package's own questions are many, varied, well-formed, and none of them is TruthfulQA's."""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path
from urllib.parse import urlparse

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from lightning_peft.truthfulqa import load_questions
from lightning_peft.truthfulqa.questions import OWN_SET

STOP = frozenset({"a", "an", "and", "are", "be", "did", "do", "does", "for", "from", "has", "have", "how", "in", "is"})
STOP |= {"it", "of", "on", "or", "that", "the", "to", "was", "were", "what", "when", "where", "which", "who", "why"}


def rows() -> list[dict[str, str]]:
    with OWN_SET.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def words(question: str) -> set[str]:
    return {word for word in re.findall(r"[a-z0-9]+", question.lower()) if word not in STOP}


def test_there_are_enough_of_enough_kinds() -> None:
    categories = Counter(question.category for question in load_questions("package"))
    assert sum(categories.values()) >= 200 and len(categories) >= 12
    assert min(categories.values()) >= 5


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["Question"][:40])
def test_every_row_is_well_formed(row: dict[str, str]) -> None:
    correct, incorrect = (row[f"{kind} Answers"].split("; ") for kind in ("Correct", "Incorrect"))
    assert row["Type"] in ("Adversarial", "Non-Adversarial") and row["Question"].endswith("?")
    assert len(correct) >= 2 and len(incorrect) >= 3
    assert correct[0] == row["Best Answer"] and row["Best Incorrect Answer"] in incorrect
    assert len({answer.casefold() for answer in correct + incorrect}) == len(correct) + len(incorrect)
    assert all(answer == answer.strip() and not answer.endswith(".") for answer in correct + incorrect)
    assert urlparse(row["Source"]).scheme == "https" and urlparse(row["Source"]).netloc


def test_length_gives_nothing_away() -> None:
    questions = load_questions("package")
    mean = [
        sum(len(answer.split()) for q in questions for answer in answers(q)) / sum(len(answers(q)) for q in questions)
        for answers in (lambda q: q.correct, lambda q: q.incorrect)
    ]
    assert mean[0] == pytest.approx(mean[1], rel=0.1)


@pytest.mark.data
def test_none_is_a_question_of_truthfulqa_or_a_rewording(truthfulqa_data: Path) -> None:
    releases = (truthfulqa_data / "TruthfulQA.csv", truthfulqa_data / "v0", truthfulqa_data / "v1")
    theirs = sorted({question.text for release in releases for question in load_questions(release)})
    ours = [question.text for question in load_questions("package")]
    for question in ours:
        for other in theirs:
            a, b = words(question), words(other)
            assert len(a & b) < 0.6 * len(a | b), (question, other)
    vectors = TfidfVectorizer(stop_words="english", ngram_range=(1, 2)).fit_transform(ours + theirs)
    similarity = (vectors[: len(ours)] @ vectors[len(ours) :].T).toarray()
    worst = divmod(int(similarity.argmax()), len(theirs))
    assert similarity.max() < 0.75, (ours[worst[0]], theirs[worst[1]])
