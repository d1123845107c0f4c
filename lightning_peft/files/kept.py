"""Files that a run keeps for the next one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_peft.files.records import DamagedError, read_record, write_record


def hashed(described: Any) -> str:
    """Return the SHA-256 of a JSON-able description; other values count by their `str`."""
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def kept(
    path: Path,
    key: Any,
    make: Callable[[], Any],
    fits: Callable[[Any], bool],
    say: Callable[[str], None],
    names: tuple[str, str] = ("key", "made"),
) -> Any:
    """Return what `make()` gave in an earlier run under the same key, or gives now; JSON-able.

    Args:
        path: where it is kept.
        key: of what it depends on.
        make: makes it.
        fits: whether a value can be what `make` gives, for files of releases that wrote no sums.
        say: is told in a sentence of a file that is damaged, which is then made again.
        names: of the key and the value in the file.
    """
    key_name, made_name = names
    kinds = {key_name: object, made_name: object}
    try:
        record = read_record(path, kinds)
        if record[key_name] == key:
            if not fits(record[made_name]):
                raise DamagedError(f"{path} does not hold what was written")
            return record[made_name]
    except FileNotFoundError:
        pass
    except DamagedError as error:
        say(f"{error}: it is made again.")
    write_record(path, {key_name: key, made_name: make()})
    return read_record(path, kinds)[made_name]  # as the next run reads it
