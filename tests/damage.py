"""What may happen to a file between two runs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flipped(path: Path) -> None:
    """One bit of one byte anywhere, the same for the same file."""
    data, draw = bytearray(path.read_bytes()), random.Random(path.name)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _other_type(path: Path) -> None:
    path.write_text(json.dumps(random.Random(path.name).choice([[], "text", 3, None, {}, {"key": []}])) + "\n")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "emptied": lambda path: path.write_bytes(b"") and None,  # type: ignore[func-returns-value]
    "truncated": _truncated,
    "flipped": _flipped,
    "other type": _other_type,
}
