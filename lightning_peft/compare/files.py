"""Files that are written whole or not at all, and what they keep from one run to the next."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name and rename, so that a crash leaves no half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def hashed(described: Any) -> str:
    """SHA-256 of a JSON-able description; other values count by their `str`."""
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def kept(path: Path, key: str, make: Callable[[], Any]) -> Any:
    """What `make()` gave in an earlier run under the same key, or gives now; JSON-able."""
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] == key:
            return found["made"]
    made = make()
    write_atomically(path, json.dumps({"key": key, "made": made}, ensure_ascii=False) + "\n")
    return made
