"""The results of finished cells: how they are written, read and checked for damage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.compare.cell_facts import CELL_FACTS
from lightning_peft.compare.outside import OUTSIDE
from lightning_peft.files.records import DamagedError, check_sums, file_sums, read_record, write_record
from lightning_peft.tasks.cell_records import CellRecords

_KINDS: dict[str, Any] = {
    "key": str,
    "failed": (str, type(None)),
    "chosen": dict,
    "files": dict,
    **{fact.name: int if fact.kind is int else (int, float) for fact in CELL_FACTS},
}
_LATER = {fact.name for fact in CELL_FACTS if fact.later}
_SINCE_SUMS = ("files",)  # what records without a sum do not have
_WRITTEN = ("adapter", OUTSIDE)  # by any cell, beside its result


def write_result(folder: Path, result: Mapping[str, Any], records: CellRecords) -> dict[str, Any]:
    """Write a cell's result, with the size and SHA-256 of every other file that the cell has written.

    Returns:
        The result as a later run reads it: numbers as keys have become text.
    """
    path = folder / "result.json"
    write_record(path, {**result, "files": file_sums(folder, (*_WRITTEN, *records.files))})
    return read_record(path, _KINDS | dict(records.kinds), later=_LATER)


def finished(folder: Path, key: str, records: CellRecords) -> dict[str, Any] | None:
    """Return the result of a cell that is finished, and every file of which is as it was written.

    A cell of a release that wrote no sums counts where its files can be read and go with its result.

    Args:
        folder: the cell's.
        key: of what its result depends on.
        records: of the task: what its cells hold.

    Returns:
        None where the cell has failed, was of another key, or has never run.

    Raises:
        DamagedError: a file is missing or is not what was written.
    """
    path, kinds = folder / "result.json", _KINDS | dict(records.kinds)
    try:
        result = read_record(path, kinds, kinds.keys() - {*_SINCE_SUMS, *records.since_sums}, _LATER)
    except FileNotFoundError:
        if any((folder / name).exists() for name in (*_WRITTEN, *records.files)):
            raise DamagedError(f"{path} is missing") from None
        return None
    if result["key"] != key or result["failed"]:
        return None
    if "files" in result:
        check_sums(folder, result["files"])
    else:
        records.check_readable(folder, result)
    return result
