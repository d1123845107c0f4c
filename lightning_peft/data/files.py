"""Rows of anybody's file: CSV, TSV, JSON Lines, JSON, Parquet, a dataset of the hub, a set of this package."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_peft.backbone.nearest_names import nearest_names
from lightning_peft.files.data_error import DataError

SETS = Path(__file__).with_name("sets")  # what `package:NAME` names
_OWN = "package:"


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Args:
        values: by column, as the file has them: texts from CSV and TSV, whatever they are from the others.
        where: the file and the row, for error messages: `"my.jsonl, row 3"`, rows counted from 1. Of JSON Lines it is
            the line, of CSV and TSV the header does not count.

    Example:
        >>> Row({"text": "Thank you."}, "my.jsonl, row 1")["text"]
        'Thank you.'
    """

    values: Mapping[str, Any]
    where: str

    def __getitem__(self, column: str) -> Any:
        return self.values[column]

    def text(self, column: str) -> str:
        """Return a column's text, without spaces around it.

        Raises:
            DataError: it is empty, or no text.
        """
        value = self.values.get(column)
        if not isinstance(value, str):
            value = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
            if not isinstance(value, str):
                given = "missing" if value is None else f"no text but {_short(value)}"
                raise DataError(f"{self.where}: {column!r} is {given}.")
        if not value.strip():
            raise DataError(f"{self.where}: {column!r} is empty.")
        return value.strip()


class NamedClass(int):
    """The number of a class that the hub knows a name of.

    Args:
        number: as the dataset stores it.
        name: what it stands for.
    """

    name: str

    def __new__(cls, number: int, name: str) -> NamedClass:
        value = super().__new__(cls, number)
        value.name = name
        return value


def read_rows(path: str | Path, split: str | None = None) -> list[Row]:
    """Read all rows of a file, a hub dataset, or a set of this package.

    Args:
        path: a `.csv`, `.tsv`, `.jsonl`, `.json` or `.parquet` file, the name of a dataset on the Hugging Face hub
            (`"owner/name"`, or `"owner/name:config"`), or `"package:NAME"`.
        split: of a hub dataset; default `"train"`, or its only one. A file has none.

    Raises:
        DataError: in one sentence, with file and row: no such file or set, a kind of file that is not read, text that
            is not UTF-8, an incomplete row, no row at all; or a library that is needed is not installed.

    Example:
        >>> rows = read_rows("package:politeness")
        >>> len(rows), sorted(rows[0].values), rows[0].where
        (60, ['negative', 'positive', 'prompt'], 'package:politeness, row 1')
    """
    name = str(path)
    if name.startswith(_OWN):
        rows = read_rows(_own_set(name.removeprefix(_OWN)), split)
        return [Row(row.values, f"{name}, row {number}") for number, row in enumerate(rows, 1)]
    file = Path(name)
    read = _READERS.get(file.suffix.lower())
    if read is None and not file.exists() and _is_hub_name(name):
        return _from_hub(name, split)
    if not file.is_file():
        raise DataError(f"{name} {_missing(file)}")
    if read is None:
        raise DataError(f"{name} is a file of a kind that is not read: give one that ends in {', '.join(_READERS)}.")
    if split is not None:
        raise DataError(f"{name} is a file, which has no split {split!r}: leave split out.")
    rows = read(file)
    if not rows:
        raise DataError(f"{name} holds no row.")
    return rows


def check_columns(rows: Sequence[Row], needed: Iterable[str], where: str) -> None:
    """Raise `DataError` where no row has a column, with the names most like it.

    Args:
        rows: of one file.
        needed: the columns that must be there.
        where: the file.
    """
    known = list(dict.fromkeys(name for row in rows for name in row.values))
    for column in needed:
        if column not in known:
            near = nearest_names(column, known)
            raise DataError(
                f"{where} has no column {column!r}, but {', '.join(map(repr, known))}"
                + (f"; the nearest is {near.split(', ')[0]!r}, which an argument can name." if len(known) > 1 else ".")
            )


def _own_set(name: str) -> Path:
    known = sorted(file.stem for file in SETS.glob("*.jsonl"))
    if name not in known:
        raise DataError(f"The package has no set {name!r}; it has {', '.join(known)}.")
    return SETS / f"{name}.jsonl"


def _is_hub_name(name: str) -> bool:
    repository = name.partition(":")[0]
    return bool(repository) and repository.count("/") <= 1 and not repository.startswith((".", "~", "/"))


def _missing(file: Path) -> str:
    """Return what is said of a path that is no file."""
    if file.is_dir():
        inside = sorted(entry.name for entry in file.iterdir() if entry.suffix.lower() in _READERS)
        return "is a folder: name a file in it" + (f", such as {inside[0]}." if inside else ".")
    siblings = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
    readable = [name for name in siblings if Path(name).suffix.lower() in _READERS]
    near = sorted(readable, key=lambda name: (Path(name).stem != file.stem, name))[:3]
    return "does not exist" + (f"; beside it: {', '.join(near)}." if near else ".")


def _text(file: Path) -> str:
    data = file.read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}, line {line} is not UTF-8 text (byte {error.start} cannot be read): save the file as UTF-8."
        ) from error
    if not text.strip():
        raise DataError(f"{file} is empty.")
    return text


# -- kinds of file --------------------------------------------------------------------------------------------------


def _from_csv(file: Path) -> list[Row]:
    text = _text(file)
    header = text.lstrip().splitlines()[0]
    # spreadsheets of half the world write ; between fields
    separators = ("\t",) if file.suffix.lower() == ".tsv" else (",", ";", "\t")
    delimiter = next((separator for separator in separators if separator in header), separators[0])
    # what was pasted from pages is longer than the reader's 128 KiB a field
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        return list(
            _records(csv.reader(io.StringIO(text.lstrip("\r\n"), newline=""), delimiter=delimiter, strict=True), file)
        )
    finally:
        csv.field_size_limit(limit)


def _records(reader: Any, file: Path) -> Iterator[Row]:
    """Yield the records below a header.

    Raises:
        DataError: one has more or fewer fields than the header, a quote is not closed, or two columns have one name.
    """
    number = 0
    try:
        names = [name.strip() for name in next(reader)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{file}: the header has the column {twice[0]!r} twice.")
        for number, record in enumerate((record for record in reader if record), 1):
            where = f"{file}, row {number}"
            if len(record) != len(names):
                raise DataError(
                    f"{where} (line {reader.line_num}) has {len(record)} fields, but the header has {len(names)}: put "
                    "texts that hold the separator in double quotes."
                )
            yield Row(dict(zip(names, record, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"{file}, row {number + 1} (up to line {reader.line_num}) cannot be read: {error}.") from error


def _from_json_lines(file: Path) -> list[Row]:
    text = _text(file)
    if text.lstrip().startswith("["):
        return _from_list(_loaded(text, f"{file}"), file)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # a text may hold other ends of lines, unescaped
        if line.strip():
            where = f"{file}, row {number}"
            rows.append(_row(_loaded(line, where), where))
    return rows


def _from_json(file: Path) -> list[Row]:
    text = _text(file)
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):  # JSON Lines under another name
            return _from_json_lines(file)
        raise DataError(f"{file}, line {error.lineno} is not complete JSON ({error.msg}).") from error
    if isinstance(loaded, dict):
        loaded = _list_within(loaded, file)
    return _from_list(loaded, file)


def _list_within(loaded: Mapping[str, Any], file: Path) -> list[Any]:
    """Return the rows of an object: its one list of objects, or its columns, which are lists of one length."""
    lists = {name: value for name, value in loaded.items() if isinstance(value, list)}
    of_objects = [value for value in lists.values() if value and isinstance(value[0], dict)]
    if len(of_objects) == 1:
        return of_objects[0]
    if lists and len(lists) == len(loaded) and len({len(column) for column in lists.values()}) == 1:
        return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    raise DataError(f"{file} must hold a list of rows, as [{{…}}, {{…}}], got an object of {', '.join(loaded)}.")


def _from_list(loaded: Any, file: Path) -> list[Row]:
    if not isinstance(loaded, list):
        raise DataError(f"{file} must hold a list of rows, as [{{…}}, {{…}}], got {_short(loaded)}.")
    wheres = (f"{file}, row {number}" for number in range(1, len(loaded) + 1))
    return [_row(value, where) for value, where in zip(loaded, wheres, strict=True)]


def _loaded(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not complete JSON ({error.msg}, column {error.colno}).") from error


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f'{where} must be an object of columns, as {{"text": "…"}}, got {_short(value)}.')
    return Row(value, where)


def _from_parquet(file: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{file} is read by pyarrow, which is not installed: pip install pyarrow.") from error
    try:
        records = parquet.read_table(file).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{file} is no readable Parquet file ({str(error).splitlines()[0]}).") from error
    return [Row(record, f"{file}, row {number}") for number, record in enumerate(records, 1)]


_READERS: Mapping[str, Callable[[Path], list[Row]]] = {
    ".csv": _from_csv,
    ".tsv": _from_csv,
    ".jsonl": _from_json_lines,
    ".ndjson": _from_json_lines,
    ".json": _from_json,
    ".parquet": _from_parquet,
}


# -- the hub --------------------------------------------------------------------------------------------------------


def _from_hub(name: str, split: str | None) -> list[Row]:
    try:
        from datasets import ClassLabel, load_dataset
    except ImportError as error:
        raise DataError(
            f"{name} is no file; as the name of a hub dataset it is read by datasets, which is not installed: "
            "pip install datasets."
        ) from error
    repository, _, config = name.partition(":")
    try:
        splits = load_dataset(repository, config or None)
    except Exception as error:  # the library raises a dozen kinds for the one fact that matters
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name} is neither a file nor a dataset that could be had from the Hugging Face hub ({reason})."
        ) from error
    chosen = split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    if chosen not in splits:
        raise DataError(f"{name} has no split {chosen!r}: name one of {', '.join(splits)} with split.")
    data = splits[chosen]
    named = {column: kind.names for column, kind in data.features.items() if isinstance(kind, ClassLabel)}
    return [
        Row(record | _classes(record, named), f"{name} ({chosen}), row {number}")
        for number, record in enumerate(data, 1)
    ]


def _classes(record: Mapping[str, Any], named: Mapping[str, Sequence[str]]) -> dict[str, NamedClass]:
    """Return a record's classes with their names, which the hub stores as numbers; -1 is a class that is not known."""
    numbers = {column: record[column] for column in named if isinstance(record[column], int)}
    return {column: NamedClass(n, named[column][n]) for column, n in numbers.items() if n >= 0}


def _short(value: Any) -> str:
    written = repr(value)
    return written if len(written) <= 60 else f"{written[:57]}…"
