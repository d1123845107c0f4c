"""Print the table of what moved, of the names in a list: `python -m lightning_peft.moved [NAMES.json]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lightning_peft.moved import table


def listed(path: Path) -> list[str]:
    """Return the modules and the names, as "module.name", that a list of documented names holds."""
    names: dict[str, list[str]] = json.loads(path.read_text())["names"]
    return [*names, *(f"{module}.{name}" for module in names for name in names[module])]


if __name__ == "__main__":
    print(table(listed(Path(sys.argv[1])) if len(sys.argv) > 1 else None))
