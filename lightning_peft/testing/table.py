"""The table of laws: every method of this package on every architecture."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch

from lightning_peft.testing.architectures import ARCHITECTURES, Architecture
from lightning_peft.testing.cell import Cell, adapter_tensors
from lightning_peft.testing.check import Outcome, check_law, quietly
from lightning_peft.testing.comparing import LawBroken
from lightning_peft.testing.laws import LAWS, check_resumed
from lightning_peft.testing.methods import METHODS, Method

if TYPE_CHECKING:
    from rich.table import Table

Results = dict[tuple[str, str], list[Outcome]]  # (method, architecture) -> one outcome a law


def run(cells: Collection[tuple[str, str]], left_out: Mapping[tuple[str, str], Collection[str]] = {}) -> Results:
    """Check every law on some cells; the second half of each `resume` runs in a new process, one an architecture.

    Args:
        cells: pairs of a method in `METHODS` and an architecture in `ARCHITECTURES`.
        left_out: laws that a cell is not asked for, `resume` excepted.
    """
    results: Results = {}
    with quietly():
        for architecture in dict.fromkeys(name for _, name in cells):
            methods = {method: left_out.get((method, name), ()) for method, name in cells if name == architecture}
            results |= _run(ARCHITECTURES[architecture], methods)
    return results


def _run(architecture: Architecture, names: Mapping[str, Collection[str]]) -> Results:
    results: Results = {}
    cells = {}
    for name in names:
        method = METHODS[name]
        if missing := sorted(method.needs - architecture.has):
            reason = f"needs {', '.join(missing)}, which {architecture.name} has not"
            results[name, architecture.name] = [Outcome(law, None, reason) for law in LAWS]
        else:
            cells[name] = cell_of(method, architecture)
            laws = [law for law in LAWS if law != "resume" and law not in names[name]]
            results[name, architecture.name] = [check_law(cells[name], law) for law in laws]
    with tempfile.TemporaryDirectory() as folder:
        resumed = _resumed(Path(folder), architecture.name, cells)
    for name, outcome in resumed.items():
        results[name, architecture.name].append(outcome)
    return results


def cell_of(method: Method, architecture: Architecture) -> Cell:
    def make_module() -> L.LightningModule:
        module = architecture.make_module()
        method.prepare(module)
        return module

    # the formula speaks of the bare module, which quantising changes
    number = method.count(architecture.make_module())
    return Cell(make_module, method.make(), architecture.batches, count=None if number is None else lambda _: number)


def _resumed(folder: Path, architecture: str, cells: dict[str, Cell]) -> dict[str, Outcome]:
    """Check `resume` for several cells: first halves here, their continuation in one other process."""
    outcomes: dict[str, Outcome] = {}
    for name, cell in cells.items():
        if declared := cell.callback.exempt.get("resume"):
            outcomes[name] = Outcome("resume", None, declared)
            continue
        try:
            cell.train(1).save_checkpoint(folder / f"{name}.ckpt")
        except Exception as error:
            outcomes[name] = Outcome("resume", False, f"{type(error).__name__}: {error}")
    # sums in another order are other sums
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    code = "import sys; from lightning_peft.testing.table import continue_training; continue_training(*sys.argv[1:])"
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder), architecture]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    for name, cell in cells.items():
        if name not in outcomes:
            outcomes[name] = _compare(cell, folder / f"{name}.pt", ran.stderr)
    return outcomes


def _compare(cell: Cell, continued: Path, errors: str) -> Outcome:
    if not continued.exists():
        return Outcome("resume", False, f"the new process did not continue: {errors.strip().splitlines()[-1:]}")
    try:
        check_resumed(cell, torch.load(continued, weights_only=True))
    except LawBroken as error:
        return Outcome("resume", False, str(error))
    return Outcome("resume", True)


def continue_training(folder: str, architecture: str) -> None:
    """Train each cell's second half from its checkpoint, in the new process."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with quietly():
        for checkpoint in sorted(Path(folder).glob("*.ckpt")):
            cell = cell_of(METHODS[checkpoint.stem], ARCHITECTURES[architecture])
            try:
                continued = adapter_tensors(cell.train(2, checkpoint).lightning_module)
            except Exception as error:
                print(f"{checkpoint.stem}: {type(error).__name__}: {error}", file=sys.stderr)
            else:
                torch.save(continued, checkpoint.with_suffix(".pt"))


def show(results: Results) -> Table:
    """Return a table of methods × architectures: how many laws hold, how many do not apply, which are broken."""
    from rich.table import Table

    architectures = list(dict.fromkeys(architecture for _, architecture in results))
    table = Table(title="Laws that hold (+ that do not apply)", title_justify="left")
    table.add_column("method")
    for architecture in architectures:
        table.add_column(architecture, justify="right")
    for method in dict.fromkeys(method for method, _ in results):
        row = [_summary(results[method, a]) if (method, a) in results else "" for a in architectures]
        table.add_row(method, *row)
    return table


def reasons(results: Results) -> list[str]:
    """Return which cells do not apply and why; one line for all with the same reason."""
    return _grouped(results, None)


def broken(results: Results) -> list[str]:
    """Return which laws are broken where, and how; one line for all with the same message."""
    return _grouped(results, False)


def _grouped(results: Results, holds: bool | None) -> list[str]:
    laws: dict[tuple[tuple[str, str], str], list[str]] = {}
    for cell, outcomes in results.items():
        for outcome in outcomes:
            if outcome.holds is holds:
                laws.setdefault((cell, outcome.reason), []).append(outcome.law)
    cells: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for (cell, reason), names in laws.items():
        law = "every law" if len(names) == len(LAWS) else ", ".join(names)
        cells.setdefault((law, reason), []).append(cell)
    lines = []
    for (law, reason), where in cells.items():
        methods, architectures = (list(dict.fromkeys(part)) for part in zip(*where, strict=True))
        lines.append(f"{law}: {reason} ({', '.join(methods)} on {', '.join(architectures)})")
    return sorted(lines)


def _summary(outcomes: list[Outcome]) -> str:
    hold, missing = (sum(o.holds is value for o in outcomes) for value in (True, None))
    wrong = [o.law for o in outcomes if o.holds is False]
    if wrong:
        return f"[red]{', '.join(wrong)}[/red]"
    return f"{hold}" + (f" + {missing}" if missing else "") if hold else "–"
