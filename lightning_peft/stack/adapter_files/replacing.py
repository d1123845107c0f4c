"""The files of an adapter's folder, replaced together: whenever the writer dies, old or new is there to be read.

Two files cannot be renamed at once, and a folder cannot be renamed over one that holds anything, such as the user's own
files. So new files are written into a folder within. They count from the moment at which a list of them is renamed to
its place, and are moved to theirs from then on: by the writer or, where it died, by whoever comes next.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_peft.files.atomic import clear, clear_folder, locked, sync
from lightning_peft.stack.adapter_files.names import COMPRESSED, CONFIG, NOTES, ORDER, README, WEIGHTS, is_folder_name
from lightning_peft.stack.adapter_files.typed_values import AdapterError, check_plain, read_json

STAGED = ".lightning_peft.new"
_LIST = "files.json"
_PART = (CONFIG, WEIGHTS, COMPRESSED, NOTES)  # of a part, the one that says it is whole first


@contextmanager
def replacing(root: Path, files: Sequence[str]) -> Iterator[Path]:
    """Yield a folder to write files into; left without an error, they become the adapter of `root`.

    Other files in `root` stay, except those of an adapter that are not among `files`. A second process waits.

    Args:
        root: the folder of the adapter, or stack; made if need be.
        files: every file, relative to it: an adapter's, or a part's folder and its file.

    Raises:
        AdapterError: a file cannot be put there, since a folder or a link stands in its way.
    """
    existed = root.is_dir()
    root.mkdir(parents=True, exist_ok=True)
    staged = root / STAGED
    try:
        with locked(staged):
            _finish(root)
            clear_folder(staged)
            try:
                _check_places(root, files)
                for folder in _folders(files):
                    (staged / folder).mkdir(exist_ok=True)
                yield staged
                for file in files:
                    sync(staged / file)
                (staged / "list").write_text(json.dumps(list(files)))
                sync(staged / "list")
                os.replace(staged / "list", staged / _LIST)
            except BaseException:
                (staged / _LIST).unlink(missing_ok=True)  # first, or it would list what is gone
                clear(staged)
                raise
            _finish(root)
            clear(staged)
    except BaseException:
        if not existed:
            with suppress(OSError):  # unless something has been put there
                root.rmdir()
        raise


def finish(root: Path) -> None:
    """Move the files of an adapter to their places where the process that replaced it died before it had done so.

    Raises:
        AdapterError: that cannot be done.
    """
    staged = root / STAGED
    if staged.is_symlink() or not (staged / _LIST).is_file():
        return
    try:
        with locked(staged, make=False):
            _finish(root)
            clear(staged)
    except FileNotFoundError:  # its writer is alive, and is done
        return
    except OSError as error:
        raise AdapterError(
            f"{root} was being replaced when that was cut off, and to finish it is not possible here: {error.strerror}."
        ) from error


def _finish(root: Path) -> None:
    """Move the listed files to their places, however many of them an earlier process has moved."""
    staged = root / STAGED
    if not (staged / _LIST).is_file():
        return
    files = read_json(staged / _LIST)
    check_plain(files, list[str], str(staged / _LIST))
    _check_places(root, files)
    _check_places(staged, files)
    for folder in _folders(files):
        (root / folder).mkdir(exist_ok=True)
        for name in _PART if folder else (ORDER, *_PART):
            file = f"{folder}/{name}".lstrip("/")
            # readers that know nothing of this find no mixture: what says that all is there goes first and comes last
            if file not in files or (name in (CONFIG, ORDER) and (staged / file).exists()):
                (root / file).unlink(missing_ok=True)
    for file in sorted(files, key=lambda file: (file == ORDER, file.endswith(CONFIG))):
        with suppress(FileNotFoundError):  # it is there already
            os.replace(staged / file, root / file)
    (staged / _LIST).unlink()


def _folders(files: Sequence[str]) -> list[str]:
    """Return the folders that files are in, `""` first, which is their root."""
    return ["", *dict.fromkeys(file.rpartition("/")[0] for file in files if "/" in file)]


def _check_places(root: Path, files: Sequence[str]) -> None:
    """Raise `AdapterError` unless the files are whole adapters', and their places within `root` free or files'."""
    for file in files:
        *above, name = file.split("/")
        known = name in _PART or name == README
        if not (known and len(above) < 2 and all(map(is_folder_name, above))) and file != ORDER:
            raise AdapterError(f"{root} cannot hold {file!r}, which is no file of an adapter.")
        folder = "".join(above)
        if folder and ((root / folder).is_symlink() or ((root / folder).exists() and not (root / folder).is_dir())):
            raise AdapterError(f"{root / folder} is a link or a file where an adapter's folder should be: remove it.")
        if (root / file).is_dir() and not (root / file).is_symlink():
            raise AdapterError(f"{root / file} is a folder where an adapter's file should be: remove it.")
    for folder in {file.rpartition("/")[0] for file in files}:
        heads = {f"{folder}/{CONFIG}"} if folder else {CONFIG, ORDER}
        if not heads & set(files):
            raise AdapterError(f"{root} cannot hold {', '.join(map(repr, files))} without {sorted(heads)[0]}.")
