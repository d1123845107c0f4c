"""The results of finished cells: how they are written, read and checked for damage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.files.records import DamagedError, check_sums, file_sums, read_record, write_record
from lightning_peft.stack.adapter_files.folder import adapter_folders, check_finite, read_folder
from lightning_peft.truthfulqa.samples import FILES, TASKS, read_samples

_KINDS: dict[str, Any] = {
    "key": str,
    "failed": (str, type(None)),
    "samples": list,
    "effects": dict,
    "seconds": (int, float),
    "scoring_seconds": (int, float),
    "chosen": dict,
    "trainable_parameters": int,
    "edited_parameters": int,
    "adapter_bytes": int,
    "texts": dict,
    "files": dict,
}
_SINCE_SUMS = ("texts", "files")  # what records without a sum do not have
_WRITTEN = ("adapter", *FILES.values())  # by a cell, beside its result


def write_result(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write a cell's result, with the size and SHA-256 of every other file that the cell has written.

    Returns:
        The result as a later run reads it: numbers as keys have become text.
    """
    path = folder / "result.json"
    write_record(path, {**result, "files": file_sums(folder, _WRITTEN)})
    return read_record(path, _KINDS)


def finished(folder: Path, key: str) -> dict[str, Any] | None:
    """Return the result of a cell that is finished, and every file of which is as it was written.

    A cell of a release that wrote no sums counts where its files can be read and go with its result.

    Args:
        folder: the cell's.
        key: of what its result depends on.

    Returns:
        None where the cell has failed, was of another key, or has never run.

    Raises:
        DamagedError: a file is missing or is not what was written.
    """
    path = folder / "result.json"
    try:
        result = read_record(path, _KINDS, _KINDS.keys() - set(_SINCE_SUMS))
    except FileNotFoundError:
        if any((folder / name).exists() for name in _WRITTEN):
            raise DamagedError(f"{path} is missing") from None
        return None
    if result["key"] != key or result["failed"]:
        return None
    if "files" in result:
        check_sums(folder, result["files"])
    else:
        _check_readable(folder, result)
    return result


def _check_readable(folder: Path, result: Mapping[str, Any]) -> None:
    """Raise `DamagedError` where the files of a cell cannot be those of its result."""
    questions: dict[str, set[int]] = {}
    try:
        for task in TASKS:
            questions[task] = {sample["question_id"] for sample in result["samples"] if sample[task] >= 0}
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{folder / 'result.json'} holds no samples as they were written") from error
    for task, file in FILES.items():
        path = folder / file
        try:
            logged = {sample["doc_id"] for sample in read_samples(path) if 0 <= sample["acc"] <= 1}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"{path} cannot be read ({type(error).__name__})") from error
        if logged != questions[task]:
            raise DamagedError(f"{path} holds {len(logged)} questions where {len(questions[task])} were written")
    if not result["adapter_bytes"]:
        return
    size = 0
    try:
        for part in adapter_folders(folder / "adapter"):
            config, tensors, notes = read_folder(part)
            if config.peft_type is None or "fingerprint" not in notes:
                raise DamagedError(f"{part} lacks its adapter's kind or the base's fingerprint")
            check_finite(tensors, str(part))
            size += sum(tensor.nbytes for tensor in tensors.values())
    except ValueError as error:
        raise DamagedError(str(error).rstrip(".")) from error
    if size != result["adapter_bytes"]:
        written = f"{result['adapter_bytes']:,} were written"
        raise DamagedError(f"{folder / 'adapter'} holds {size:,} bytes of tensors where {written}")
