"""All rows of the parity table: each module named `with_<peer>.py` beside this one gives some."""

from __future__ import annotations

import importlib
from pathlib import Path

from parity.comparison import Comparison


def comparisons() -> list[Comparison]:
    """Return the rows of every peer, in the order of the modules' names; each has a function `comparisons`."""
    rows: list[Comparison] = []
    for file in sorted(Path(__file__).parent.glob("with_*.py")):
        rows += importlib.import_module(f"parity.{file.stem}").comparisons()
    return rows
