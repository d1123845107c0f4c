"""`lightning-peft sweep`: a grid of numbers of heads and strengths of ITI, in one go."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning_peft.cli.arguments import one_sentence, read_plan
from lightning_peft.cli.old_options import as_written, with_task_options


def main(args: list[str]) -> dict[str, Any]:
    """Run a sweep, print its table, draw its picture, and return the results."""
    from rich.console import Console

    from lightning_peft.files.locking import only_writer
    from lightning_peft.sweep.plot import save_picture
    from lightning_peft.sweep.results import table, verdict
    from lightning_peft.sweep.run import run
    from lightning_peft.sweep.settings import Sweep, check
    from lightning_peft.truthfulqa.task import TruthfulQA  # noqa: F401 - so that a plan may say `task: TruthfulQA`

    does = "Measure ITI at many numbers of heads and strengths together, on a task that scores choices."
    with one_sentence("sweep"):
        plan, settings, wait = read_plan("sweep", does, Sweep, with_task_options(args))
    settings = as_written(settings)
    console = Console(width=None if sys.stdout.isatty() else 160)
    output = Path(plan.output or f"runs/{plan.name}")
    with one_sentence("sweep"):
        check(plan)
        with only_writer(output, wait, console.print):  # until the picture is drawn too
            results = run(plan, settings, console)
            console.print(table(results))
            for sentence in verdict(results):
                console.print(sentence, highlight=False)
            written = [output / "table.csv", output / "results.json", save_picture(results, output)]
    console.print(", ".join(str(path) for path in written if path), highlight=False, soft_wrap=True)
    return results
