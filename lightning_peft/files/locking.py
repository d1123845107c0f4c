"""One folder, one writer: a second process or thread is told who has the folder, or waits."""

from __future__ import annotations

import json
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_peft.files.records import write_atomically

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK = ".lock"
HOLDER = ".lock-holder.json"


class FolderInUseError(OSError):
    """Another run writes to the folder; the message says which."""


@contextmanager
def only_writer(folder: Path, wait: bool = False, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold a folder for this thread until the block ends.

    The lock is the system's (`flock`) and ends with its process; the thread that holds it may
    enter again. Where the folder's file system has no locks the run goes on without one, with a warning.

    Args:
        folder: made if need be.
        wait: wait for the folder in place of raising.
        say: is told who is waited for.

    Raises:
        FolderInUseError: another process or thread holds the folder.
    """
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.resolve() / LOCK, is_singleton=True)
    if not _acquire(lock, folder, wait, say):
        yield
        return
    try:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        write_atomically(folder / HOLDER, json.dumps(holder) + "\n")
        yield
    finally:
        lock.release()


def _acquire(lock: BaseFileLock, folder: Path, wait: bool, say: Callable[[str], None]) -> bool:
    """Acquire the lock and return whether it is held; False where the file system has none."""
    from filelock import Timeout

    try:
        lock.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise FolderInUseError(f"{_holder(folder)}: wait for it (--wait), or name another output.") from None
        say(f"{_holder(folder)}: waiting for it.")
        lock.acquire()
    except (NotImplementedError, OSError) as error:
        warnings.warn(f"{folder} cannot be locked ({error}): let no other run write there meanwhile.", stacklevel=4)
        return False
    return True


def _holder(folder: Path) -> str:
    """Say who has a folder, as far as it is known."""
    try:
        holder = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is only just beginning
        who = "another process"
    return f"{folder} is in use by {who}"
