"""Run a plan cell by cell, resumably."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_peft.compare.cell import cell_of, quiet, run_cell
from lightning_peft.compare.cell_facts import unknown_facts
from lightning_peft.compare.collecting import collect
from lightning_peft.compare.finished import finished, write_result
from lightning_peft.compare.outside import OUTSIDE
from lightning_peft.compare.plan import Plan, Row, cell_key, check, settings_of
from lightning_peft.files.locking import only_writer
from lightning_peft.files.records import DamagedError, write_atomically
from lightning_peft.tasks.cell_records import CellRecords

Place = tuple[str, int, int]  # a row's name, a seed and a fold


def run(
    plan: Plan, settings: Mapping[str, Any] | None = None, console: Console | None = None, wait: bool = False
) -> dict[str, Any]:
    """Run every cell that is not finished yet, then write the results.

    These are `results.json`, and what the task's records and sections write beside it.

    A cell's result is written whole under its own name once it is finished, so a killed run loses at most the cell
    it was in. A failed cell is noted, does not stop the others, and is tried again next time. A cell any file of which
    is missing or is not as it was written is named and computed again.

    Args:
        plan: the plan.
        settings: the plan as it was written, row settings by name under `"rows"`; default its own description.
        console: where to report progress; default the terminal.
        wait: where another run writes to the same folder, wait for its end.

    Returns:
        The content of `results.json`, which `results.py` reads.

    Raises:
        ValueError: the plan could not be run to its end.
        FolderInUseError: another run writes to the same folder.
    """
    check(plan)
    console = Console() if console is None else console
    output = Path(plan.output or f"runs/{plan.name}")
    with only_writer(output, wait, console.print):
        return _run(plan, settings_of(plan) if settings is None else settings, console, output)


def _run(plan: Plan, settings: Mapping[str, Any], console: Console, output: Path) -> dict[str, Any]:
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    records, folds = plan.task.records, range(plan.task.folds)
    places = {(row.name, seed, fold): row for row in plan.rows for seed in plan.all_seeds for fold in folds}
    folders = {place: output / "cells" / plan.folder_name(*place) for place in places}
    cells = {
        (name, seed, fold): cell_of(plan, row, fold, folders[name, seed, fold], seed=seed)
        for (name, seed, fold), row in places.items()
    }
    # before anything that costs time, and before what a key hashes is asked for
    keys = {(name, seed, fold): cell_key(plan, settings, row, fold, seed) for (name, seed, fold), row in places.items()}
    before = _finished_before(keys, folders, records, console)
    missing = [cell for place, cell in cells.items() if place not in before]
    records.check([cells[row.name, plan.all_seeds[0], 0] for row in plan.rows], missing, list(cells.values()))
    quiet()
    outcomes: dict[Place, dict[str, Any]] = {}
    begin = time.perf_counter()
    for number, (place, row) in enumerate(places.items(), start=1):
        seed = f", seed {place[1]}" if len(plan.all_seeds) > 1 else ""
        title = f"[{number}/{len(cells)}] {row.label}{seed}, fold {place[2]}"
        if place in before:
            console.print(f"{title}: finished before", highlight=False, markup=False)
            outcomes[place] = before[place]
            continue
        console.print(title, highlight=False, markup=False)
        outcome = outcomes[place] = _attempt(plan, row, place, folders[place], keys[place], outcomes)
        seconds = time.perf_counter() - begin
        status = f"failed: {outcome['failed']}" if outcome["failed"] else f"done, {seconds:.0f} s so far"
        console.print(f"  {status}", highlight=False, markup=False)
    done = {
        (name, seed, fold): cell_of(plan, row, fold, folders[name, seed, fold], outcomes[name, seed, fold], seed)
        for (name, seed, fold), row in places.items()
    }
    sections = list(plan.task.sections)
    for section in sections:
        section.prepare(list(done.values()), say)
    results = collect(plan, settings, done, sections)
    records.write([cell for (_, seed, _), cell in done.items() if seed == plan.all_seeds[0]], output)
    for section in sections:
        section.write(output)
    write_atomically(output / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return results


def _finished_before(
    keys: Mapping[Place, str], folders: Mapping[Place, Path], records: CellRecords, console: Console
) -> dict[Place, dict[str, Any]]:
    """Return the results of the cells that are finished; name each that is damaged, and is computed again."""
    results = {}
    for place, key in keys.items():
        try:
            result = finished(folders[place], key, records)
        except DamagedError as error:
            console.print(f"{error}: this cell is computed again.", highlight=False, markup=False, soft_wrap=True)
            continue
        if result is not None:
            results[place] = result
    return results


def _attempt(
    plan: Plan, row: Row, place: Place, folder: Path, key: str, outcomes: Mapping[Place, dict[str, Any]]
) -> dict[str, Any]:
    records, (_, seed, fold) = plan.task.records, place
    empty: dict[str, Any] = {name: kind() for name, kind in records.kinds.items()}
    empty |= {"chosen": {}, **unknown_facts()}
    shutil.rmtree(folder / "adapter", ignore_errors=True)  # what an earlier attempt left
    (folder / OUTSIDE).unlink(missing_ok=True)
    try:
        for earlier in row.earlier:
            if outcomes[earlier, seed, fold]["failed"]:
                raise RuntimeError(f"it needs {earlier!r}, which failed")
        adapters = {name: folder.parent / plan.folder_name(name, seed, fold) / "adapter" for name in row.earlier}
        result = {"key": key, "failed": None, **run_cell(plan, row, fold, folder, adapters, seed)}
        _check_units(plan, row, fold, result, outcomes)
    except Exception as error:  # whatever a method does wrong, the other rows are worth having
        result = {"key": key, "failed": f"{type(error).__name__}: {error}", **empty}
    return write_result(folder, result, records)


def _check_units(
    plan: Plan, row: Row, fold: int, result: Mapping[str, Any], outcomes: Mapping[Place, Mapping[str, Any]]
) -> None:
    """Raise `ValueError` where a cell has tested units of another fold, or others than the rows before it."""
    task, unit = plan.task, plan.task.unit
    tested = task.records.units(result)
    for (name, _, other), outcome in outcomes.items():
        if outcome["failed"] or (name != row.name and other != fold):
            continue
        known = task.records.units(outcome)
        if other != fold and (twice := tested & known):
            raise ValueError(
                f"{len(twice)} {unit}s are tested in fold {other} and in fold {fold}, the first is {min(twice)}: "
                f"{type(task).__name__}.data must put every {unit} into one fold."
            )
        if other == fold and tested != known:
            raise ValueError(
                f"{row.name!r} was tested on {len(tested)} {unit}s of fold {fold} and {name!r} on {len(known)}, of "
                f"which {len(tested & known)} are the same: differences are between scores of the same {unit}s."
            )
