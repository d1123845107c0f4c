"""Print the parity table, method × peer × architecture, as Markdown: the numbers in docs/parity.md.

python benchmarks/parity/table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from parity.rows import comparisons


def main() -> None:
    print("| method | peer | architecture | outputs | gradients | parameters | note |")
    print("|---|---|---|---|---|---|---|")
    for row in comparisons():
        difference = row.difference()
        gradients = "" if difference.gradients is None else f"{difference.gradients:.1e}"
        parameters = "" if difference.parameters is None else f"{difference.parameters[0]} = {difference.parameters[1]}"
        print(
            f"| {row.method} | {row.peer} | {row.architecture} | {difference.outputs:.1e} | {gradients} | {parameters} "
            f"| {row.note} |"
        )


if __name__ == "__main__":
    main()
