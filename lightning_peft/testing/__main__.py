"""`python -m lightning_peft.testing [--methods NAME …] [--architectures NAME …]`: the table of laws."""

from __future__ import annotations

import argparse
import sys

import torch
from rich.console import Console

from lightning_peft.testing.architectures import ARCHITECTURES
from lightning_peft.testing.methods import METHODS
from lightning_peft.testing.table import broken, reasons, run, show


def main() -> int:
    """Print the table, what does not apply and what is broken; the exit status says whether anything is."""
    parser = argparse.ArgumentParser(prog="python -m lightning_peft.testing", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument(
        "--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="NAME"
    )
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # tiny models gain nothing from a second
    results = run([(method, architecture) for method in chosen.methods for architecture in chosen.architectures])
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(show(results))
    outcomes = [outcome for cell in results.values() for outcome in cell]
    hold, missing = (sum(outcome.holds is value for outcome in outcomes) for value in (True, None))
    console.print(f"{hold} hold, {missing} do not apply, {len(outcomes) - hold - missing} are broken.")
    for title, lines in (("Do not apply", reasons(results)), ("Broken", broken(results))):
        for number, line in enumerate(lines):
            console.print(f"{title}:" * (number == 0), highlight=False, end="\n" * (number == 0))
            console.print(f"  {line}", highlight=False, markup=False)
    return int(bool(broken(results)))


if __name__ == "__main__":
    sys.exit(main())
