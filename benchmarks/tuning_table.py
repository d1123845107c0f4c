"""Print the results of the comparison of every tuned method as a Markdown table, and what the plan expected.

    lightning-peft compare --config configs/compare/tuning.yaml --accelerator cpu
    python benchmarks/tuning_table.py runs/tuning/results.json

Rows are sorted by accuracy. Differences that the plan asks for are paired by notice, of means over seeds, with 95 %
bootstrap intervals over notices.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
PAIRS = (
    ("lora", "full"), ("rslora", "lora"), ("dora", "lora"), ("qlora", "lora"), ("adalora", "lora"), ("lorta", "lora"),
    ("loretta_rep", "lora"), ("loretta_adp", "houlsby"), ("lora_dash", "lora"), ("ist", "ist_uniform"), ("ist", "lora"),
    ("sara", "lt_sft"), ("diff_pruning", "lt_sft"), ("sara", "diff_pruning"), ("sara", "full"), ("lt_sft", "full"),
    ("diff_pruning", "full"), ("movement_pruning", "base"), ("movement_pruning", "lora"), ("loreft", "lora"),
    ("head_gains", "bitfit"), ("head_offsets", "bitfit"), ("lofit", "bitfit"), ("compacter", "houlsby"),
    ("compacter_plus_plus", "houlsby"), ("ia3", "lora"), ("ssl", "lora"), ("ssb", "full"), ("singular_values", "lora"),
)  # fmt: skip


def size(count: float) -> str:
    """Return bytes in the unit in which they have at most three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def share(value: float, sign: str = "") -> str:
    """Return a share with three places and without the zero before the point."""
    return f"{value:{sign}.3f}".replace("0.", ".", 1)


def table(rows: list[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table."""
    lines = [
        "| method | accuracy [95 %] | seeds | trained | adapter | ms a step | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row["metrics"]["accuracy"]["mean"]):
        found = row["metrics"]["accuracy"]
        lines.append(
            f"| {row['label']} | {share(found['mean'])} [{share(found['low'])}, {share(found['high'])}] "
            f"| {' '.join(share(value) for value in row['seeds']['accuracy'])} | {row['trainable_parameters']:,} "
            f"| {size(row['adapter_bytes'])} | {1000 * row['step_seconds']:.0f} | {size(row['peak_memory'])} |"
        )
    return lines


def units(folder: Path, name: str) -> NDArray[np.float64]:
    """Return of each test notice, in the order of their numbers, the mean over seeds of whether it was told right."""
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-seed*.json"))]
    columns = [
        dict(zip(map(int, cell["units"]), (value for (value,) in cell["columns"]["accuracy"]), strict=True))
        for cell in cells
    ]
    return np.mean([[column[unit] for unit in sorted(columns[0])] for column in columns], axis=0)


def differences(folder: Path, rng: np.random.Generator) -> list[str]:
    """Return a line for each difference that the plan speaks of, from the kept cells."""
    lines = ["| less | difference in accuracy [95 %] |", "|---|---|"]
    for first, second in PAIRS:
        if not all(any(folder.glob(f"{name}-seed*.json")) for name in (first, second)):
            continue  # not finished
        change = units(folder, first) - units(folder, second)
        drawn = change[rng.integers(0, len(change), (DRAWS, len(change)))].mean(1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        lines.append(
            f"| `{first}` less `{second}` | {share(change.mean(), '+')} [{share(low, '+')}, {share(high, '+')}] |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path("docs/results/tuning/results.json"))
    parser.add_argument("--cells", type=Path, default=Path("docs/results/tuning/cells"))
    options = parser.parse_args()
    rows = [row for row in json.loads(options.results.read_text())["rows"] if not row["failed"]]
    print("\n".join([*table(rows), "", *differences(options.cells, np.random.default_rng(0))]))


if __name__ == "__main__":
    main()
