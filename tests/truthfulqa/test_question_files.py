"""Other people's question files: other scripts, the hub's layouts, answers that are on both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.truthfulqa import DataError, load_questions

CHOICES: dict[str, Any] = {
    "question": "水在哪里？",
    "mc1_targets": {"choices": ["在海里。", "在火里。"], "labels": [1, 0]},
    "mc2_targets": {"choices": ["在海里。", "在湖里。", "在火里。"], "labels": [1, 1, 0]},
}
ANSWERS: dict[str, Any] = {
    "type": "Adversarial",
    "category": "Water",
    "question": "水在哪里？",
    "best_answer": "在海里。",
    "correct_answers": ["在海里。", "在湖里！", "in a lake; or two"],
    "incorrect_answers": ["在火里。", "他说：“没有。”"],
    "source": "made up",
}


def written(folder: Path, name: str, *entries: object) -> Path:
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")
    else:
        path.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl"])
def test_the_hubs_choices_are_read(tmp_path: Path, name: str) -> None:
    (question,) = load_questions(written(tmp_path, name, CHOICES))
    labels = {choice.text: (choice.mc0, choice.mc1, choice.mc2) for choice in question.choices}
    assert labels == {"在海里。": (-1, 1, 1), "在火里。": (-1, 0, 0), "在湖里。": (-1, -1, 1)}
    assert question.best == "在海里。" and question.correct == ("在海里。", "在湖里。") and question.id == 0


@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl"])
def test_the_hubs_answers_are_read_and_end_as_their_script_ends_sentences(tmp_path: Path, name: str) -> None:
    (question,) = load_questions(written(tmp_path, name, ANSWERS))
    assert question.correct == ("在海里。", "在湖里！", "in a lake; or two.") and question.category == "Water"
    assert question.incorrect == ("在火里。", "他说：“没有。”") and question.best == "在海里。"
    assert [choice.text for choice in question.choices if choice.mc1 == 0] == list(question.incorrect)


def test_a_parquet_file_is_read(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([ANSWERS]), tmp_path / "mine.parquet")
    assert load_questions(tmp_path / "mine.parquet") == load_questions(written(tmp_path, "mine.jsonl", ANSWERS))


def test_the_benchmarks_own_layout_is_read_from_lines_too(tmp_path: Path) -> None:
    entry = CHOICES | {f"mc{i}_targets": dict(zip(*CHOICES[f"mc{i}_targets"].values(), strict=True)) for i in (1, 2)}
    lines, whole = (load_questions(written(tmp_path, name, entry)) for name in ("mine.jsonl", "mine.json"))
    assert lines == whole == load_questions(written(tmp_path, "hub.json", CHOICES))


MC2 = CHOICES["mc2_targets"]
BOTH = {"choices": ["在海里。", "在火里。", "在海里。"], "labels": [1, 0, 0]}


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (CHOICES | {"mc2_targets": BOTH}, r"row 2, mc2_targets: the answer '在海里。' is both true and false"),
        (
            CHOICES | {"mc2_targets": MC2 | {"labels": [0, 1, 0]}},
            r"row 2: the answer '在海里。' is both true and false",
        ),
        (CHOICES | {"mc2_targets": MC2 | {"labels": [1]}}, r"row 2, mc2_targets has 3 choices, but 1 labels"),
        (CHOICES | {"mc2_targets": MC2 | {"labels": [1, 2, 0]}}, r"'在湖里。' is labelled 2, not 0 or 1"),
        (CHOICES | {"mc1_targets": {"choices": [1, 2], "labels": [1, 0]}}, r"choices must be texts, got 1"),
    ],
)
def test_choices_that_cannot_be_used_are_one_sentence_with_the_row(
    tmp_path: Path, entry: dict[str, Any], sentence: str
) -> None:
    first = CHOICES | {"question": "哪里？"}
    with pytest.raises(DataError, match=sentence):
        load_questions(written(tmp_path, "mine.jsonl", first, entry))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"incorrect_answers": ["在湖里！", "在火里。"]}, r"row 2: the answer '在湖里！' is both true and false"),
        ({"incorrect_answers": []}, r"row 2: 'incorrect_answers' must be a list of texts, got \[\]"),
        ({"correct_answers": "在海里。"}, r"row 2: 'correct_answers' must be a list of texts, got '在海里。'"),
        ({"best_answer": None}, r"row 2: 'best_answer' must be a text, got None"),
        ({"question": "哪里？"}, r"row 2: the question of row 0 stands here again"),
    ],
)
def test_answers_that_cannot_be_used_are_one_sentence_with_the_row(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        load_questions(written(tmp_path, "mine.jsonl", ANSWERS | {"question": "哪里？"}, ANSWERS | change))


def test_an_answer_that_an_object_has_twice_with_both_labels_is_one_sentence(tmp_path: Path) -> None:
    text = (
        '[{"question": "Is it?", "mc1_targets": {"Yes.": 1, "No.": 0}, "mc2_targets": {"Yes.": 1, "No.": 0, "No.": 1}}]'
    )
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(DataError, match=r"line 1, question 0, mc2_targets: the answer 'No\.' is both true and false"):
        load_questions(tmp_path / "mine.json")


@pytest.mark.data
def test_the_benchmarks_own_answers_on_both_sides_stay_false(truthfulqa_data: Path) -> None:
    for release in ("v0", "v1"):
        questions = load_questions(truthfulqa_data / release / "TruthfulQA.csv")
        either = {
            choice.mc2
            for q in questions
            for choice in q.choices
            if choice.text == "Unknown." and choice.text in q.incorrect
        }
        assert len(questions) == 817 and either == {0}
