"""`lightning-peft sweep`: a grid of numbers of heads and strengths of ITI, in one go."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning_peft.cli.arguments import one_sentence


def main(args: list[str]) -> dict[str, Any]:
    """Run a sweep, print its table, draw its picture; returns the results."""
    from jsonargparse import ArgumentParser
    from rich.console import Console

    from lightning_peft.files.locking import only_writer
    from lightning_peft.sweep.plot import save_picture
    from lightning_peft.sweep.results import table, verdict
    from lightning_peft.sweep.run import run
    from lightning_peft.sweep.settings import Sweep, check

    parser = ArgumentParser(
        prog="lightning-peft sweep", description="Measure ITI at many numbers of heads and strengths together."
    )
    parser.add_argument("--config", action="config", help="YAML file with the sweep")
    parser.add_class_arguments(Sweep, as_positional=False)
    parser.add_argument("--wait", action="store_true", help="where another run writes to the same folder, wait for it")
    parsed = parser.parse_args(args[1:])
    settings = parsed.clone().as_dict()
    wait = settings.pop("wait")
    settings.pop("config", None)
    instantiated = parser.instantiate(parsed).as_dict()
    for name in ("config", "wait"):
        instantiated.pop(name, None)
    plan = Sweep(**instantiated)
    console = Console(width=None if sys.stdout.isatty() else 140)
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
