"""Every release loads with its known counts, and bad files are one sentence with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_peft.truthfulqa import DataError, Question, load_questions
from lightning_peft.truthfulqa.folds import assign_folds, inner_split
from lightning_peft.truthfulqa.questions import data_hash, subset

HEADER = "Type,Category,Question,Best Answer,Best Incorrect Answer,Correct Answers,Incorrect Answers,Source"
ROW = "Adversarial,Tests,Is it?,It is,It is not,It is; Yes; It is,It is not; No,made up"


def table(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "TruthfulQA.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def task(folder: Path, *entries: object) -> Path:
    path = folder / "mc_task.json"
    path.write_text(json.dumps(list(entries)))
    return path


ENTRY = {"question": "Is it?", "mc1_targets": {"Yes.": 1, "No.": 0}, "mc2_targets": {"Yes.": 1, "No.": 0, "It is.": 1}}


def count(questions: list[Question], metric: str) -> int:
    return sum(getattr(choice, metric) >= 0 for question in questions for choice in question.choices)


@pytest.mark.data
@pytest.mark.parametrize(("release", "counts"), [("v0", (817, 0, 4114, 5882)), ("v1", (817, 0, 4186, 6204))])
def test_the_releases_of_817_questions(truthfulqa_data: Path, release: str, counts: tuple[int, ...]) -> None:
    questions = load_questions(truthfulqa_data / release)
    assert (len(questions), *(count(questions, f"mc{i}") for i in range(3))) == counts
    assert len({q.category for q in questions}) == 38 and all(q.category != "unknown" for q in questions)


@pytest.mark.data
def test_the_release_of_790_questions_has_the_binary_choice_and_39_empty_ones(truthfulqa_data: Path) -> None:
    with pytest.warns(UserWarning, match="39 empty choices"):
        questions = load_questions(truthfulqa_data)
    assert len(questions) == 790 and len({q.category for q in questions}) == 37
    # 4,057 and 6,045 in the file, 17 and 22 of them empty
    assert [count(questions, f"mc{i}") for i in range(3)] == [2 * 790, 4057 - 17, 6045 - 22]


@pytest.mark.data
def test_choices_from_a_csv_are_those_of_the_task_file_for_most_questions(truthfulqa_data: Path) -> None:
    by_table = {q.text: {c.text for c in q.choices} for q in load_questions(truthfulqa_data / "v1" / "TruthfulQA.csv")}
    by_task = {q.text: {c.text for c in q.choices} for q in load_questions(truthfulqa_data / "v1" / "mc_task.json")}
    assert sum(by_table.get(text) == choices for text, choices in by_task.items()) > 0.9 * len(by_task)


def test_a_csv_by_hand(tmp_path: Path) -> None:
    (question,) = load_questions(table(tmp_path, ROW))
    assert question.best == "It is." and question.correct == ("It is.", "Yes.") and question.category == "Tests"
    found = {c.text: (c.mc0, c.mc1, c.mc2) for c in question.choices}
    assert found == {"It is.": (1, 1, 1), "Yes.": (-1, -1, 1), "It is not.": (0, 0, 0), "No.": (-1, 0, 0)}


def test_categories_are_joined_from_the_csv(tmp_path: Path) -> None:
    table(tmp_path, ROW)
    task(tmp_path, ENTRY, {**ENTRY, "question": "Another?"})
    assert [q.category for q in load_questions(tmp_path)] == ["Tests", "unknown"]


@pytest.mark.parametrize(
    ("rows", "header", "sentence"),
    [
        ([ROW], HEADER.replace("Incorrect Answers", "Wrong"), r"TruthfulQA.csv, line 1: there is no column"),
        (
            [ROW, ROW.replace("Is it?", "Why?").replace("It is; Yes; It is", "")],
            HEADER,
            "line 3: 'Correct Answers' is empty",
        ),
        ([ROW, ROW], HEADER, "line 3: the question of row 0 stands here again"),
        ([], HEADER, "holds no question"),
    ],
)
def test_a_bad_csv_is_one_sentence(tmp_path: Path, rows: list[str], header: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        load_questions(table(tmp_path, *rows, header=header))


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([{"question": "Is it?"}], "question 0: 'mc1_targets' is missing"),
        ([ENTRY, ENTRY], "question 1: the question of row 0 stands here again"),
        ([{**ENTRY, "mc2_targets": {"Yes.": 1}}], "question 0, mc2_targets needs a true and a false choice"),
        ([{**ENTRY, "mc2_targets": {"Yes.": 2, "No.": 0}}], "labelled 2, not 0 or 1"),
        ([], "must hold a list of questions"),
    ],
)
def test_a_bad_task_file_is_one_sentence(tmp_path: Path, entries: list[object], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        load_questions(task(tmp_path, *entries))


def test_truncated_json_and_wrong_encoding_are_one_sentence(tmp_path: Path) -> None:
    path = task(tmp_path, ENTRY)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(DataError, match=r"mc_task.json, line 1: not complete JSON"):
        load_questions(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8"):
        load_questions(path)
    latin = table(tmp_path, ROW)
    latin.write_bytes(latin.read_bytes().replace(b"Yes", b"\xe9t\xe9"))
    with pytest.raises(DataError, match="is not UTF-8"):
        load_questions(latin)
    with pytest.raises(DataError, match="neither a question file nor a folder"):
        load_questions(tmp_path / "nowhere")


@pytest.mark.parametrize("cut", ['"mc2_targets"', '"Is it 2?"', "Is it 2?", ": 0"])
def test_a_file_cut_off_anywhere_is_named_by_the_line_where_it_ends(tmp_path: Path, cut: str) -> None:
    path = task(tmp_path)
    whole = json.dumps([{**ENTRY, "question": f"Is it {i}?"} for i in range(3)], indent=1)
    path.write_text(whole[: whole.rindex(cut) + len(cut)])
    with pytest.raises(DataError, match=rf"mc_task.json, line {len(path.read_text().splitlines())}: not complete JSON"):
        load_questions(path)


def test_empty_choices_are_named_by_the_first_one_s_line(tmp_path: Path) -> None:
    entries = [{**ENTRY, "question": "Is it so?"}, {**ENTRY, "mc1_targets": {"Yes.": 1, "No.": 0, "": 0}}]
    path = task(tmp_path)
    path.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]")
    with pytest.warns(UserWarning, match=r"mc_task.json, from line 3 on: 1 empty choices are left out\.$"):
        load_questions(path)


def test_a_bad_entry_or_byte_is_named_by_its_line(tmp_path: Path) -> None:
    entries = [{**ENTRY, "question": f"Is it {i}?"} for i in range(3)]
    path = tmp_path / "mc_task.json"
    for bad, sentence in (
        ({**ENTRY, "question": " Is  it 0?"}, "the question of row 0 stands here again"),
        ({"question": "Why?", "mc1_targets": {"Yes.": 1, "No.": 0}}, "'mc2_targets' is missing or empty"),
        (7, "'question' is missing or empty"),
    ):
        path.write_text("\n" + json.dumps([*entries, bad], indent=1))
        line = len(json.dumps(entries, indent=1).splitlines()) + 1  # where the list ended, after the blank line
        with pytest.raises(DataError, match=rf"mc_task.json, line {line}, question 3: {sentence}"):
            load_questions(path)
    path.write_bytes(path.read_bytes().replace(b"Is it 2?", b"Is it \xe9?"))
    line = path.read_bytes().split(b"\xe9")[0].count(b"\n") + 1
    with pytest.raises(DataError, match=rf"mc_task.json, line {line} is not UTF-8 text"):
        load_questions(path)
    rows = [ROW.replace("Is it?", f"Is it {i}?") for i in range(3000)]  # more than a reader takes at once
    latin = table(tmp_path, *rows)
    latin.write_bytes(latin.read_bytes().replace(b"Is it 2500?", b"Is it \xe9?"))
    with pytest.raises(DataError, match=r"TruthfulQA.csv, line 2502 is not UTF-8 text"):
        load_questions(latin)


def test_the_hub_out_of_reach_is_one_sentence() -> None:
    with pytest.raises(DataError, match='source="package"'):
        load_questions("hub")


def test_folds_are_even_stratified_grouped_and_seeded() -> None:
    questions = load_questions("package")
    folds = assign_folds(questions, 2, seed=3)
    assert folds == assign_folds(questions, 2, seed=3) != assign_folds(questions, 2, seed=4)
    assert abs(folds.count(0) - folds.count(1)) <= 1
    for category in {q.category for q in questions}:
        members = [fold for question, fold in zip(questions, folds, strict=True) if question.category == category]
        assert abs(members.count(0) - members.count(1)) <= 1
    twice = [*questions, Question(999, questions[0].text.upper(), "Other", (), "", (), ())]
    assert assign_folds(twice)[-1] == assign_folds(twice)[0]
    with pytest.raises(ValueError, match="num_folds must be from 2"):
        assign_folds(questions, 1)


def test_the_inner_split_holds_out_whole_questions() -> None:
    questions = load_questions("package")
    train, val = inner_split(questions, 0.2)
    assert {q.id for q in train}.isdisjoint({q.id for q in val}) and len(train) + len(val) == len(questions)
    assert len(val) == pytest.approx(0.2 * len(questions), abs=1)


def test_a_subset_keeps_categories_in_proportion() -> None:
    questions = load_questions("package")
    chosen = subset(questions, len(questions) // 2, seed=1)
    assert [q.id for q in chosen] == sorted(q.id for q in chosen) and chosen == subset(questions, len(chosen), seed=1)
    for category in {q.category for q in questions}:
        whole = sum(q.category == category for q in questions)
        assert abs(sum(q.category == category for q in chosen) - whole / 2) <= 1
    assert data_hash(chosen) != data_hash(questions)
    with pytest.raises(ValueError, match="limit is 0"):
        subset(questions, 0)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (ROW.replace("It is not; No", "; ;"), "line 2 needs a true and a false choice"),
        (ROW.replace("It is not; No", "It is; No"), r"line 2: the answer 'It is\.' is both true and false"),
        (ROW.replace("It is not; No", "No; yes"), r"line 2: the answer 'yes\.' is both true and false"),
        (ROW.replace("It is,It is not,", "It is,It is,"), "line 2 needs a true and a false choice"),
    ],
)
def test_a_csv_row_whose_answers_contradict_each_other_is_one_sentence(tmp_path: Path, row: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        load_questions(table(tmp_path, row))


@pytest.mark.filterwarnings("ignore:.*empty choices")
@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({**ENTRY, "mc1_targets": {"": 1, "No.": 0}}, "question 0, mc1_targets needs a true and a false choice"),
        ({**ENTRY, "question": 5}, "question 0: 'question' must be a text, got 5"),
        ({**ENTRY, "question": "  "}, "question 0: 'question' must be a text"),
    ],
)
def test_a_task_entry_that_cannot_be_scored_is_one_sentence(tmp_path: Path, entry: object, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        load_questions(task(tmp_path, entry))


def test_a_mistyped_task_file_is_not_replaced_by_the_csv_beside_it(tmp_path: Path) -> None:
    table(tmp_path, ROW)
    with pytest.raises(DataError, match=r"mc_tsk.json does not exist"):
        load_questions(tmp_path / "mc_tsk.json")


def test_a_truncated_csv_names_its_line_and_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = table(tmp_path, ROW)
    path.write_text(path.read_text() + 'Adversarial,Tests,"Wh')
    with pytest.raises(DataError, match=r"TruthfulQA.csv, line 3: not complete CSV"):
        load_questions(path)
    path.unlink()
    path = task(tmp_path, ENTRY)
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert len(load_questions(path)) == 1
