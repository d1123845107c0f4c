"""Files and folders that appear whole: written under another name beside their place, then renamed.

What is written stands under one fixed name for each target, so that the next writer clears away what a killed one left.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Windows has no fcntl, and there nobody is kept out
fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None


@contextmanager
def new_file(path: str | Path, writer: str = "new") -> Iterator[Path]:
    """Yield a file to write; left without an error, it takes the place of `path`, else it is gone.

    Args:
        path: the file to make or replace; folders above it are made.
        writer: ends the name under which it is written: one of its own for each of several that write at once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{writer}")
    clear(temporary)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        clear(temporary)
        raise


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a folder to write into; left without an error, it takes the place of `path`, else it is gone.

    Args:
        path: a folder that does not exist yet or is empty; folders above it are made.
    """
    path = Path(os.path.realpath(path))
    with _beside(path, "new") as temporary:
        try:
            yield temporary
            if os.name == "nt" and path.exists():
                path.rmdir()  # elsewhere a rename takes the place of an empty folder at once
            os.replace(temporary, path)
        except BaseException:
            clear(temporary)
            raise


@contextmanager
def scratch_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside a path, to try what will be at the path; afterwards it is gone."""
    with _beside(Path(os.path.abspath(path)), "trial") as scratch:
        try:
            yield scratch
        finally:
            clear(scratch)


@contextmanager
def locked(folder: Path, make: bool = True) -> Iterator[None]:
    """Hold a folder's lock, which one process has at a time and which ends with its process.

    Args:
        folder: the folder; whoever holds its lock may move it away or remove it.
        make: make it where it is not there.

    Raises:
        FileNotFoundError: it is not there and not to be made.
    """
    while True:
        if make:
            _make(folder)
        if fcntl is None:
            yield
            return
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            if make:  # and it has been removed meanwhile
                continue
            raise
        try:
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            # whoever had the lock before may have moved the folder away: then this is the lock of another
            if _is_at(handle, folder):
                yield
                return
        finally:
            os.close(handle)


def clear(path: Path) -> None:
    """Remove a file or folder; of a link the link alone."""
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clear_folder(folder: Path) -> None:
    """Remove everything in a folder."""
    for path in folder.iterdir():
        clear(path)


def sync(path: Path) -> None:
    """Write a file through to the disk, so that a rename cannot get there before its content."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _beside(path: Path, writer: str) -> Iterator[Path]:
    """Yield an empty folder beside a path, which no other process has at the time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name}.{writer}")
    with locked(folder):
        clear_folder(folder)
        yield folder


def _make(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    with suppress(FileExistsError):
        os.mkdir(folder)


def _is_at(handle: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), folder.lstat())
    except FileNotFoundError:
        return False


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
