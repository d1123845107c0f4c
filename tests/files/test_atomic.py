"""Files and folders appear whole, whenever their writer dies, and the next writer clears away what is left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from deaths import WAYS, each_death

from lightning_peft.files.atomic import new_file, new_folder, scratch_folder


def folder(path: Path) -> None:
    with new_folder(path) as made:
        (made / "inner").mkdir()
        for name in ("a", "inner/b"):
            (made / name).write_text("new")


def file(path: Path) -> None:
    with new_file(path) as made:
        made.write_text("new")


def scratch(path: Path) -> None:
    with scratch_folder(path) as made:
        (made / "a").write_text("new")
        (made / "inner").mkdir()


def nothing(path: Path) -> None:
    pass


def content(path: Path) -> dict[str, str] | None:
    """What is at a path: every file in it; None where nothing is."""
    if path.is_file():
        return {"": path.read_text()}
    files = [inner for inner in path.rglob("*") if inner.is_file()]
    return {str(inner.relative_to(path)): inner.read_text() for inner in files} if path.is_dir() else None


NEW = {"a": "new", "inner/b": "new"}
WRITERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], object], list[dict[str, str] | None]]] = {
    "a new folder": (folder, nothing, [None, NEW]),
    "an empty folder": (folder, Path.mkdir, [{}, NEW]),
    "a new file": (file, nothing, [None, {"": "new"}]),
    "a file": (file, lambda path: path.write_text("old"), [{"": "old"}, {"": "new"}]),
    "a trial": (scratch, nothing, [None, None]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", WRITERS)
def test_all_or_nothing_appears(case: str, way: str, tmp_path: Path) -> None:
    write, begin, (before, after) = WRITERS[case]
    path = tmp_path / "place"
    begin(path)
    for number in each_death(lambda: write(path), way):
        assert content(path) in (before, after), f"a part after operation {number}"
        assert way != "interrupted" or content(path) == before, "who is interrupted leaves it as it was"
        if content(path) == before:
            write(path)
        assert {inner.name for inner in tmp_path.iterdir()} <= {"place"}, "the next one clears away what is left"
        if path.is_dir():
            for inner in sorted(path.rglob("*"), reverse=True):
                inner.rmdir() if inner.is_dir() else inner.unlink()
            path.rmdir()
        path.unlink(missing_ok=True)
        begin(path)
    assert content(path) == after and {inner.name for inner in tmp_path.iterdir()} <= {"place"}


def test_a_folder_with_something_in_it_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "thesis.txt").write_text("the only copy")
    with pytest.raises(OSError, match="not empty"):
        folder(tmp_path / "place")
    assert content(tmp_path) == {"place/thesis.txt": "the only copy"}


def test_processes_that_make_the_same_folder_wait_for_each_other(tmp_path: Path) -> None:
    children = []
    for number in range(4):
        if (child := os.fork()) == 0:
            code = 1
            try:
                with new_folder(tmp_path / "place") as made:
                    for name in range(50):
                        (made / str(name)).write_text(str(number))
                code = 0
            except OSError:
                code = 2
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [0, 2, 2, 2], "one makes it, the others find that it is no longer empty"
    found = content(tmp_path / "place")
    assert found is not None and len(found) == 50 and set(found.values()) == {str(codes.index(0))}
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
