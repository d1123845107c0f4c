"""Prompts from a file, and answers into one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from lightning_peft.files.atomic import new_file
from lightning_peft.files.data_error import DataError
from lightning_peft.generation.prompts import Prompt

_DEFAULT = "prompt"
_CHATS = ("messages", "conversations", "conversation")


class FilePrompt(NamedTuple):
    """A prompt, and where it stands, for messages: `"my.jsonl, row 3"`."""

    prompt: Prompt
    where: str


def read_prompts(path: str | Path, column: str | None = None) -> list[FilePrompt]:
    """Read the prompts of a file.

    Args:
        path: a `.txt` file with a prompt a line; a table (`.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet`, or a dataset
            of the hub); or `"-"`, lines of the standard input.
        column: of a table; default `prompt`, or else `messages`, or else the only one. Values are texts, or lists of
            messages, of which a last one of the assistant's is left out: it is what the model is asked for.

    Raises:
        DataError: with file and row: it cannot be read, has no such column, or a value is neither text nor messages.
    """
    if str(path) == "-":
        return _lines(sys.stdin.read(), "Standard input", "line")
    path = Path(path)
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise DataError(f"{path} does not exist.")
        try:
            return _lines(path.read_text(encoding="utf-8"), str(path), "line")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is no UTF-8 text (byte {error.start}).") from error
    from lightning_peft.data.files import check_columns, read_rows

    rows = read_rows(path)
    if column is None:
        names = list(dict.fromkeys(name for row in rows for name in row.values))
        column = next(
            (name for name in (_DEFAULT, *_CHATS) if name in names), names[0] if len(names) == 1 else _DEFAULT
        )
    check_columns(rows, [column], str(path))
    return [FilePrompt(_value(row.values, column, row.where), row.where) for row in rows]


@contextmanager
def writing_answers(path: str | Path | None) -> Iterator[TextIO]:
    """Yield a file for answers, a JSON object a line, which appears under its name when it is complete.

    Args:
        path: the file; None is the standard output.
    """
    if path is None:
        yield sys.stdout
        return
    if Path(path).is_dir():
        raise DataError(f"{path} is a folder: name a file to write, such as {Path(path) / 'answers.jsonl'}.")
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file


def answer_line(values: Mapping[str, Any]) -> str:
    """Return one line of a file of answers."""
    return json.dumps(values, ensure_ascii=False) + "\n"


def _lines(text: str, source: str, unit: str) -> list[FilePrompt]:
    prompts = [
        FilePrompt(line, f"{source}, {unit} {number}")
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not prompts:
        raise DataError(f"{source} holds no prompt.")
    return prompts


def _value(values: Mapping[str, Any], column: str, where: str) -> Prompt:
    value = values.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(item, Mapping) for item in value):
        return value[:-1] if value and value[-1].get("role") == "assistant" else value
    given = "is missing" if value is None else f"holds {str(value)[:60]!r}, neither a text nor messages"
    raise DataError(f"{where}: {column!r} {given}.")
