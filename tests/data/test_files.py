"""Rows are read from every kind of file, and what cannot be read is one sentence with file and row."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from lightning_peft.data import read_rows
from lightning_peft.data.files import SETS, Row, check_columns
from lightning_peft.files.data_error import DataError

ROWS = [{"text": 'He said "no", then left.', "label": "1"}, {"text": "Zwei\nZeilen; ü", "label": "0"}]
AS_CSV = 'text,label\n"He said ""no"", then left.",1\n"Zwei\nZeilen; ü",0\n'
FILES = {
    "a.csv": AS_CSV.encode(),
    "bom.csv": AS_CSV.encode("utf-8-sig"),
    "semicolons.csv": b'text;label\n"He said ""no"", then left.";1\n"Zwei\nZeilen; \xc3\xbc";0\n',
    "a.tsv": AS_CSV.replace(",1", "\t1").replace(",0", "\t0").replace("text,", "text\t").encode(),
    "utf16.tsv": AS_CSV.replace(",1", "\t1").replace(",0", "\t0").replace("text,", "text\t").encode("utf-16"),
    "a.jsonl": "".join(json.dumps(row) + "\n\n" for row in ROWS).encode(),
    "bom.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode("utf-8-sig"),
    "list.jsonl": json.dumps(ROWS).encode(),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "within.json": json.dumps({"version": 2, "data": ROWS}).encode(),
    "columns.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}).encode(),
    "lines.json": "\n".join(map(json.dumps, ROWS)).encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_rows_are_the_same_in_every_kind_of_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    rows = read_rows(tmp_path / name)
    assert [dict(row.values) for row in rows] == ROWS
    assert rows[1].where == f"{tmp_path / name}, row {3 if name == 'a.jsonl' else 2}", "of lines, that of the file"


def test_parquet_is_read(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert [dict(row.values) for row in read_rows(tmp_path / "a.parquet")] == ROWS


BROKEN = [
    ("a.csv", b"", r"a\.csv is empty"),
    ("a.csv", b"text,label\n", r"a\.csv holds no row"),
    ("a.csv", b"text,label\nhi,1\nhi, there,0\n", r"row 2 \(line 3\) has 3 fields, but the header has 2"),
    ("a.csv", b'text,label\nhi,1\n"hi,0\n', r"row 2 \(up to line 3\) cannot be read: unexpected end of data"),
    ("a.csv", b"text,text\nhi,1\n", r"the header has the column 'text' twice"),
    ("a.csv", b"text\nhi\n\xff\xe4\n", r"a\.csv, line 3 is not UTF-8 text .*: save the file as UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, row 2 is not complete JSON"),
    ("a.jsonl", b'{"text": "a"}\n3\n', r"a\.jsonl, row 2 must be an object of columns, .*, got 3"),
    ("a.json", b'[{"text": "a"},\n{"text"', r"a\.json, line 2 is not complete JSON"),
    ("a.json", b'{"text": "a"}', r"must hold a list of rows, .*, got an object of text"),
    ("a.json", b"[]", r"a\.json holds no row"),
    ("a.parquet", b"PAR1", r"a\.parquet is no readable Parquet file"),
    ("a.txt", b"hi", r"a\.txt is a file of a kind that is not read: give one that ends in \.csv, "),
]


@pytest.mark.parametrize(("name", "data", "sentence"), BROKEN)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, data: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=sentence) as raised:
        read_rows(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_path_that_is_no_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes(FILES["a.csv"])
    with pytest.raises(DataError, match=r"mine\.jsonl does not exist; beside it: mine\.csv\.$"):
        read_rows(tmp_path / "mine.jsonl")
    with pytest.raises(DataError, match=r"is a folder: name a file in it, such as mine\.csv\.$"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match=r"is a file, which has no split 'train'"):
        read_rows(tmp_path / "mine.csv", split="train")
    with pytest.raises(DataError, match=r"^The package has no set 'polite'; it has .*politeness"):
        read_rows("package:polite")
    with pytest.raises(DataError, match=r"^owner/name is neither a file nor a dataset that could be had .*hub"):
        read_rows("owner/name")


@pytest.mark.parametrize(("module", "path"), [("pyarrow", "a.parquet"), ("datasets", "owner/name")])
def test_a_library_that_is_missing_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, path: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=rf"read by {module}, which is not installed: pip install {module}\.$"):
        read_rows(path)


def test_a_hub_dataset_has_the_names_of_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from lightning_peft.data.files import NamedClass

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict({"validation": table}))
    rows = read_rows("owner/name")
    assert [row["label"] for row in rows] == [1, 0] and rows[1].where == "owner/name (validation), row 2"
    assert isinstance(rows[0]["label"], NamedClass) and rows[0]["label"].name == "good"
    with pytest.raises(DataError, match=r"^owner/name has no split 'test': name one of validation with split\.$"):
        read_rows("owner/name", split="test")


def test_a_missing_column_is_named_with_the_nearest() -> None:
    rows = [Row({"texts": "a", "labels": 1}, "a.csv, row 1")]
    with pytest.raises(
        DataError, match=r"^a\.csv has no column 'label', but 'texts', 'labels'; the nearest is 'labels'"
    ):
        check_columns(rows, ["texts", "label"], "a.csv")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [(None, "is missing"), ("  ", "is empty"), ([1], r"is no text but \[1\]"), (True, "is no text but True")],
)
def test_a_value_that_is_no_text_is_one_sentence_with_the_row(value: object, sentence: str) -> None:
    with pytest.raises(DataError, match=rf"^a\.csv, row 4: 'text' {sentence}\.$"):
        Row({"text": value}, "a.csv, row 4").text("text")
    assert Row({"text": 12}, "a.csv, row 4").text("text") == "12"


@pytest.mark.parametrize(("name", "count"), [("politeness", 60), ("certainty", 60), ("ab_questions", 40)])
def test_the_packages_sets_have_their_rows_and_none_twice(name: str, count: int) -> None:
    rows = read_rows(f"package:{name}")
    assert len(rows) == count and (SETS / f"{name}.jsonl").is_file()
    for column in rows[0].values:
        if not column.startswith("answer"):
            texts = [row.text(column) for row in rows]
            assert len({" ".join(text.lower().split()) for text in texts}) == count


def test_the_packages_behaviour_set_is_balanced() -> None:
    rows = read_rows("package:ab_questions")
    assert sum(row["answer_matching_behavior"] == "(A)" for row in rows) == 20
    for row in rows:
        assert "\n(A) " in row["question"] and "\n(B) " in row["question"]
        assert {row["answer_matching_behavior"], row["answer_not_matching_behavior"]} == {"(A)", "(B)"}


def test_the_packages_notices_ask_for_more_than_a_bag_of_words() -> None:
    rows = read_rows("package:notices")
    texts = {split: [row["text"] for row in rows if row["split"] == split] for split in ("train", "test")}
    kinds = {split: [row["label"] for row in rows if row["split"] == split] for split in ("train", "test")}
    assert (len(texts["train"]), len(texts["test"]), len(set(kinds["test"]))) == (1400, 1000, 4)
    assert len({row["text"] for row in rows}) == len(rows)
    counts = CountVectorizer()
    bag = LogisticRegression(max_iter=1000).fit(counts.fit_transform(texts["train"]), kinds["train"])
    # the larger half names a second thing, of another kind
    assert 0.4 < bag.score(counts.transform(texts["test"]), kinds["test"]) < 0.66


def test_the_packages_notices_are_what_their_script_writes() -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "notices.py"))
    written = (json.dumps(row, ensure_ascii=False) + "\n" for row in script["notices"]())
    assert (SETS / "notices.jsonl").read_text(encoding="utf-8") == "".join(written)
