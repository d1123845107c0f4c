"""A record gives back what was written, and no change of a single bit of it goes unnoticed."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.files.records import (
    DamagedError,
    check_sums,
    file_sums,
    read_record,
    write_atomically,
    write_record,
)

VALUES: dict[str, Any] = {"a": [0.1 + 0.2, 1e-05, float("nan")], "b": {"é": None, "": "\x1f\n"}, "c": ""}
KINDS: dict[str, Any] = {"a": list, "b": dict, "c": str}


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, VALUES, indent=1)
    assert repr(read_record(path, KINDS)) == repr(VALUES)
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(DamagedError, match=str(path)):
                read_record(path, KINDS)


def test_a_record_without_a_sum_is_held_against_names_and_types(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(VALUES))
    assert repr(read_record(path, KINDS)) == repr(VALUES)
    assert read_record(path, KINDS | {"d": int}, unsummed=KINDS).keys() == KINDS.keys()
    for kinds in (KINDS | {"d": int}, {"a": list}, KINDS | {"c": int}):
        with pytest.raises(DamagedError):
            read_record(path, kinds)
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "none.json", KINDS)


def test_files_are_as_they_were_or_named(tmp_path: Path) -> None:
    for name in ("a.txt", "deep/b.txt", "deep/er/c.txt", "other.txt"):
        write_atomically(tmp_path / name, f"{name}\n")
    sums = file_sums(tmp_path, ["a.txt", "deep", "none"])
    assert list(sums) == ["a.txt", "deep/b.txt", "deep/er/c.txt"]
    (tmp_path / "other.txt").unlink()
    check_sums(tmp_path, sums)
    (tmp_path / "deep" / "er" / "c.txt").write_text("deep/er/d.txt\n")
    with pytest.raises(DamagedError, match=r"deep/er/c\.txt holds other bytes than were written$"):
        check_sums(tmp_path, sums)


def test_many_writers_of_one_file_leave_one_whole_text_and_nothing_else(tmp_path: Path) -> None:
    texts = [str(i) * 10_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: [write_atomically(tmp_path / "x", text) for _ in range(20)], texts))
    assert (tmp_path / "x").read_text() in texts and [path.name for path in tmp_path.iterdir()] == ["x"]
