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

_FLOAT32 = "float32"  # the columns that are written in as few digits as say which float32 it is
_UNITS = "units"  # of every column, in their order, written once
_LEFT_OUT = ("files", "sha256")  # sums of weights that are not kept, and of the record itself


def keep(run: Path, folder: Path) -> int:
    """Write the finished cells of a comparison's folder as small files; return their number."""
    count = 0
    for path in sorted(run.glob("cells/*/result.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["failed"]:
            continue
        kept = {name: value for name, value in record.items() if name not in _LEFT_OUT}
        columns = kept.get("columns", {})
        kept[_FLOAT32] = [name for name, values in columns.items() if _all_float32(values)]
        for name in kept[_FLOAT32]:
            columns[name] = {unit: [float(str(np.float32(v))) for v in draws] for unit, draws in columns[name].items()}
        if units := list(next(iter(columns.values()), {})):
            kept[_UNITS] = units
            kept["columns"] = {name: [values[unit] for unit in units] for name, values in columns.items()}
        write_atomically(folder / f"{path.parent.name}.json", json.dumps(kept, separators=(",", ":")) + "\n")
        count += 1
    return count


def restore(folder: Path, run: Path) -> int:
    """Put kept cells into a comparison's folder, where it has none of their names; return their number."""
    count = 0
    for path in sorted(folder.glob("*.json")):
        cell = run / "cells" / path.stem / "result.json"
        if not cell.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if units := kept.pop(_UNITS, None):
                kept["columns"] = {name: dict(zip(units, of, strict=True)) for name, of in kept["columns"].items()}
            columns = kept.get("columns", {})
            for name in kept.pop(_FLOAT32):
                columns[name] = {unit: [float(np.float32(v)) for v in draws] for unit, draws in columns[name].items()}
            write_record(cell, kept | {"files": {}})
            count += 1
    return count


def _all_float32(values: dict[str, list[Any]]) -> bool:
    """Return whether a column holds floats alone, each of which a float32 holds."""
    return all(isinstance(v, float) and float(np.float32(v)) == v for draws in values.values() for v in draws)


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
