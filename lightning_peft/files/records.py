"""Files that a later run relies on: written whole or not at all, with sums that show damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning_peft.files.atomic import new_file

_SUM = "sha256"  # of a record, with nothing in this place
Kind = type | tuple[type, ...]


class DamagedError(ValueError):
    """A file is missing, or is not what was written; the message names it and says how it differs."""


def write_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it: neither a crash nor a second writer leaves a mixture.

    Args:
        path: of the file; folders above it are made.
        text: its content.
    """
    with new_file(path, f"{uuid4().hex}.tmp") as file:
        file.write_text(text, encoding="utf-8")


def write_record(path: Path, values: Mapping[str, Any], indent: int | None = None) -> None:
    """Write JSON-able values as one JSON object, which holds the SHA-256 of its own text without it.

    Args:
        path: of the file.
        values: by name; names are strings at every depth, or would not come back as they were.
        indent: as of `json.dumps`.
    """
    text = json.dumps({**values, _SUM: ""}, indent=indent, ensure_ascii=False) + "\n"
    before, _, after = text.rpartition('""')
    write_atomically(path, f'{before}"{_sum(text)}"{after}')


def read_record(
    path: Path, kinds: Mapping[str, Kind], unsummed: Iterable[str] | None = None, later: Iterable[str] = ()
) -> dict[str, Any]:
    """Read what `write_record` wrote; a record without a sum, of an old release, is checked for names and types alone.

    Args:
        path: of the file.
        kinds: the type of each value, by name.
        unsummed: the names in a record without a sum; default all.
        later: names that came later, which a record may lack.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedError: it is not such a record, or its sum is not that of its values.
    """
    try:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read as JSON ({type(error).__name__})") from error
    if not isinstance(record, dict):
        raise DamagedError(f"{path} holds a {type(record).__name__} where an object was written")
    summed, written = _SUM in record, record.pop(_SUM, None)
    expected = kinds.keys() if summed or unsummed is None else set(unsummed)
    if not expected - set(later) <= record.keys() <= set(expected):
        raise DamagedError(f"{path} holds {', '.join(record) or 'nothing'} where {', '.join(kinds)} were written")
    before, _, after = text.rpartition(f'"{written}"')
    if summed and written != _sum(f'{before}""{after}'):
        raise DamagedError(f"{path} holds other values than were written")
    for name, value in record.items():
        if not isinstance(value, kinds[name]):
            raise DamagedError(f"{path} holds a {type(value).__name__} as {name}")
    return record


def file_sums(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of files of a folder, and of all files of folders in it, by their paths within it.

    Args:
        folder: the folder.
        names: of files and folders in it; those that are not there are passed over.
    """
    paths = [folder / name for name in names]
    files = [path for top in paths for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): _described(path) for path in sorted(files)}


def check_sums(folder: Path, sums: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `DamagedError` for the first file that is not as `file_sums` found it; other files do not matter."""
    for name, written in sums.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{path} is missing")
        if (size := path.stat().st_size) != written["bytes"]:
            raise DamagedError(f"{path} has {size:,} bytes where {written['bytes']:,} were written")
        if _described(path) != written:
            raise DamagedError(f"{path} holds other bytes than were written")


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
