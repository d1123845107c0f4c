"""Keep what a comparison's finished cells measured, without their weights, and go on from it elsewhere.

    python benchmarks/kept_cells.py keep runs/tuning docs/results/tuning/cells
    python benchmarks/kept_cells.py restore docs/results/tuning/cells runs/tuning

`keep` writes one JSON file a cell; `restore` puts them back as finished cells without adapters, which `lightning-peft
compare` then counts as finished where their plan has not changed. A cell that is there already is left as it is. Rows
that start from another row's adapter cannot be run from what is restored.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from lightning_peft.files.records import write_atomically, write_record

_LEFT_OUT = ("files", "sha256")  # sums of weights that are not kept, and of the record itself


def keep(run: Path, folder: Path) -> int:
    """Write the finished cells of a comparison's folder as small files; return their number."""
    count = 0
    for path in sorted(run.glob("cells/*/result.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["failed"]:
            continue
        kept = {name: _short(value) for name, value in record.items() if name not in _LEFT_OUT}
        write_atomically(folder / f"{path.parent.name}.json", json.dumps(kept, separators=(",", ":")) + "\n")
        count += 1
    return count


def restore(folder: Path, run: Path) -> int:
    """Put kept cells into a comparison's folder, where it has none of their names; return their number."""
    count = 0
    for path in sorted(folder.glob("*.json")):
        cell = run / "cells" / path.stem / "result.json"
        if not cell.exists():
            write_record(cell, json.loads(path.read_text(encoding="utf-8")) | {"files": {}})
            count += 1
    return count


def _short(value: Any) -> Any:
    """Return a value with each float that a float32 holds in as few digits as say which, which is the same float32."""
    if isinstance(value, dict):
        return {name: _short(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_short(inner) for inner in value]
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("keep", "restore"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    count = {"keep": keep, "restore": restore}[arguments.what](arguments.source, arguments.target)
    print(f"{count} cells from {arguments.source} to {arguments.target}")


if __name__ == "__main__":
    main()
