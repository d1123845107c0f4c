"""The time of `import lightning_peft` against `import lightning`, each in fresh processes.

    python benchmarks/import_time.py [--times 9] [--quick]

Also of what a script really imports, `from lightning_peft.callbacks import LoRA`, and of peft, which is left for when
it is needed. Prints medians and ratios, pair by pair, with 95% intervals. About 3 minutes on two cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from pairs import machine, ratio, verdict

BOUND = 1.1
STATEMENTS = ("import lightning", "import lightning_peft", "from lightning_peft.callbacks import LoRA", "import peft")


def seconds(statement: str) -> float:
    """What the statement takes in a process that has imported nothing."""
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="twice, to see that it runs")
    options = parser.parse_args()
    times = 2 if options.quick else options.times
    print(machine())

    for statement in STATEMENTS:
        seconds(statement)  # files come from the disk the first time
    found: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for number in range(times):
        for statement in STATEMENTS if number % 2 else reversed(STATEMENTS):
            found[statement].append(seconds(statement))
    lightning = found["import lightning"]
    print()
    for statement, taken in found.items():
        print(f"{statement:<44} {sorted(taken)[len(taken) // 2]:.2f} s, / import lightning: {ratio(taken, lightning)}")
    for statement in STATEMENTS[1:3]:
        verdict(f"`{statement}` takes at most {BOUND} times as long", ratio(found[statement], lightning).high <= BOUND)


if __name__ == "__main__":
    main()
