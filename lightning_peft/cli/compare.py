"""`lightning-peft compare`: many adaptations, one table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning_peft.cli.arguments import one_sentence, read_plan
from lightning_peft.moved import warn_moved

_OLD_OPTIONS = ("model", "data", "dtype")  # of plans of 0.1, which are the task's now
_TASK_OPTIONS = ("task", *_OLD_OPTIONS)  # of which a plan has one or the others


def main(args: list[str]) -> dict[str, Any]:
    """Run a comparison, print its table, write its report, and return the results."""
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
        plan, settings, wait = read_plan("compare", does, Plan, _with_task_options(args))
    settings = {name: value for name, value in settings.items() if value is not None or name not in _TASK_OPTIONS}
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
    return results


def _with_task_options(args: list[str]) -> list[str]:
    """Return the arguments, options of 0.1 such as `--data.source` being the task's where the plan has one."""
    import yaml

    files = [args[i + 1] for i, arg in enumerate(args[:-1]) if arg == "--config"]
    files += [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    plans = [yaml.safe_load(Path(file).read_text(encoding="utf-8")) for file in files if Path(file).is_file()]
    if not any(isinstance(plan, dict) and "task" in plan for plan in plans):
        return args
    return [_with_task_option(arg) for arg in args]


def _with_task_option(arg: str) -> str:
    option, equals, value = arg.partition("=")
    name, _, rest = option.removeprefix("--").partition(".")
    if not option.startswith("--") or name not in _OLD_OPTIONS or (name == "data") != bool(rest):
        return arg
    new = f"--task.init_args.{rest or name}"
    warn_moved(option, new)
    return f"{new}{equals}{value}"
