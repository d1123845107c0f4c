"""`lightning-peft compare`: many adaptations, one table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning_peft.cli.arguments import one_sentence, read_plan
from lightning_peft.cli.old_options import as_written, with_task_options


def main(args: list[str]) -> dict[str, Any]:
    """Run a comparison, print its table, write its report, and return the results.

    Raises:
        SystemExit: with status 1, where every row has failed; the table says why.
    """
    from rich.console import Console

    from lightning_peft.compare.measured import measured_table
    from lightning_peft.compare.page import write_html
    from lightning_peft.compare.plan import Plan, check
    from lightning_peft.compare.plots import save_pictures
    from lightning_peft.compare.run import run
    from lightning_peft.compare.sections import section_views
    from lightning_peft.compare.terminal import table
    from lightning_peft.compare.verdict import verdict
    from lightning_peft.files.locking import only_writer
    from lightning_peft.truthfulqa.task import TruthfulQA  # noqa: F401 - so that a plan may say `task: TruthfulQA`

    with one_sentence("compare"):
        does = "Compare adaptations on one task."
        plan, settings, wait = read_plan("compare", does, Plan, with_task_options(args))
    settings = as_written(settings)
    settings["rows"] = {row["name"]: row for row in settings["rows"]}
    # a table of numbers must not be folded to the 80 columns assumed where there is no terminal
    console = Console(width=None if sys.stdout.isatty() else 120)
    output = Path(plan.output or f"runs/{plan.name}")
    with one_sentence("compare"):
        check(plan)
        with only_writer(output, wait, console.print):  # until the report is written too
            results = run(plan, settings, console)
            console.print(table(results))
            for view in section_views(results):
                console.print(measured_table(view))
            for sentence in verdict(results):
                console.print(sentence, highlight=False)
            if any(row["metrics"] for row in results["rows"]):
                save_pictures(results, output)
            report = write_html(results, output / "report.html")
    console.print(f"Report: {report}", highlight=False, soft_wrap=True)
    if all(row["failed"] for row in results["rows"]):
        raise SystemExit("lightning-peft compare: every row has failed, each as the table says.")
    return results
