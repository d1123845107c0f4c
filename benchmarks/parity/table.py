"""Print the parity table, method × peer × architecture, as Markdown, or write it into docs/parity.md.

python benchmarks/parity/table.py [--write]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from parity.comparison import Comparison  # noqa: E402
from parity.rows import comparisons  # noqa: E402

PAGE, MARK = ROOT / "docs/parity.md", "<!-- rows -->"
HEADER = "| method | peer | architecture | outputs | gradients | parameters | note |\n|---|---|---|---|---|---|---|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/parity.md")
    write = parser.parse_args().write
    table = "\n".join([HEADER, *map(line, comparisons())])
    print(table)
    if write:
        before, _, _ = PAGE.read_text().partition(MARK)
        PAGE.write_text(f"{before}{MARK}\n\n{table}\n")


def line(row: Comparison) -> str:
    difference = row.difference()
    gradients = "" if difference.gradients is None else f"{difference.gradients:.1e}"
    parameters = "" if difference.parameters is None else f"{difference.parameters[0]:,} = {difference.parameters[1]:,}"
    cells = (row.method, row.peer, row.architecture, f"{difference.outputs:.1e}", gradients, parameters, row.note)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
