"""A process that dies while it writes: at each of its operations on files, in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
_DEAD = 9
WAYS = ("killed", "killed while writing", "interrupted")


def each_death(work: Callable[[], object], way: str) -> Iterator[int]:
    """Run `work` again and again, the first time until its first operation on files, then until its second, …

    Args:
        work: is run in a forked process, until it comes to its end.
        way: how it ends: "killed" before the operation, "killed while writing" where that opens a file, which then has
            some of its content; or "interrupted", by an exception from which it may clean up.

    Yields:
        The number of the operation, once the process has ended there.
    """
    number = 1
    while (code := _run(work, way, number)) == _DEAD:
        yield number
        number += 1
    assert code == 0, f"the work itself failed with {code}"
    assert number > 1, "nothing was seen of the work"


def _run(work: Callable[[], object], way: str, number: int) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (opens or (event in _CHANGES and way != "killed while writing")):
            return
        count += 1
        if count != number:
            return
        if way == "interrupted":
            raise KeyboardInterrupt
        if way == "killed while writing" and arguments[2] & os.O_CREAT:
            Path(arguments[0]).write_bytes(b"{")
        os._exit(_DEAD)

    code = 1
    try:
        sys.addaudithook(hook)
        work()
        code = 0
    except KeyboardInterrupt:
        code = _DEAD
    finally:
        os._exit(code)
