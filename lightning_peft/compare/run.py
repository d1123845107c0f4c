"""Run a plan cell by cell, resumably."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_peft.compare.answering import free_answers
from lightning_peft.compare.cell import run_cell
from lightning_peft.compare.collecting import collect
from lightning_peft.compare.finished import finished, write_result
from lightning_peft.compare.plan import Plan, Row, cell_key, check, check_questions
from lightning_peft.compare.texts import check_texts
from lightning_peft.files.locking import only_writer
from lightning_peft.files.records import DamagedError, write_atomically
from lightning_peft.truthfulqa.questions import data_hash, load_questions, subset
from lightning_peft.truthfulqa.samples import FILES, read_samples, write_samples

Cell = tuple[str, int]


def run(plan: Plan, settings: Mapping[str, Any], console: Console, wait: bool = False) -> dict[str, Any]:
    """Run every cell that is not finished yet, then write the results.

    These are `results.json`, `samples.jsonl`, and each row's samples in lm-evaluation-harness's form,
    `samples/<row>/samples_truthfulqa_mc1.jsonl` and `…_mc2.jsonl`; and `answers.jsonl`, where free answers are asked
    for.

    A cell's result is written whole under its own name once it is finished, so a killed run loses at most the cell
    it was in. A failed cell is noted, does not stop the others, and is tried again next time. A cell any file of which
    is missing or is not as it was written is named and computed again.

    Args:
        plan: the plan.
        settings: the plan as it was written, row settings by name under `"rows"`.
        console: where to report progress.
        wait: where another run writes to the same folder, wait for its end.

    Returns:
        The content of `results.json`, which `results.py` reads.

    Raises:
        ValueError: the plan could not be run to its end.
        FolderInUseError: another run writes to the same folder.
    """
    check(plan)
    output = Path(plan.output or f"runs/{plan.name}")
    with only_writer(output, wait, console.print):
        return _run(plan, settings, console, output)


def _run(plan: Plan, settings: Mapping[str, Any], console: Console, output: Path) -> dict[str, Any]:
    text = plan.data.side_effects.text()
    questions = load_questions(plan.data.source)
    if plan.data.limit is not None:
        questions = subset(questions, plan.data.limit, plan.data.seed)
    check_questions(plan, questions)
    hashed = data_hash(questions)
    cells = [(row, fold) for row in plan.rows for fold in range(plan.data.num_folds)]
    of_text = hashed + (text.sha256 if text else "")
    keys = {(row.name, fold): cell_key(plan, settings, row, of_text, fold) for row, fold in cells}
    before = _finished_before(keys, output, console)
    check_texts(plan, [(row, fold) for row, fold in cells if (row.name, fold) not in before], output)
    outcomes: dict[Cell, dict[str, Any]] = {}
    begin = time.perf_counter()
    for number, (row, fold) in enumerate(cells, start=1):
        cell = row.name, fold
        title = f"[{number}/{len(cells)}] {row.label}, fold {fold}"
        if cell in before:
            console.print(f"{title}: finished before", highlight=False, markup=False)
            outcomes[cell] = before[cell]
            continue
        console.print(title, highlight=False, markup=False)
        folder = output / "cells" / f"{row.name}-fold{fold}"
        outcome = outcomes[cell] = _attempt(plan, row, fold, folder, keys[cell], outcomes)
        seconds = time.perf_counter() - begin
        status = f"failed: {outcome['failed']}" if outcome["failed"] else f"done, {seconds:.0f} s so far"
        console.print(f"  {status}", highlight=False, markup=False)
    answers = free_answers(plan, outcomes, output, console)
    results = collect(plan, settings, outcomes, answers, len(questions), hashed, output)
    if text is not None:
        described = {"documents": len(text.documents), "source": text.source, "sha256": text.sha256}
        results["data"]["text"] = described | {"tokens": plan.data.side_effects.tokens}
    samples = [s for row, fold in cells for s in outcomes[row.name, fold]["samples"]]
    write_samples(output / "samples.jsonl", samples)
    if answers:
        written = [{"method": name, "fold": fold} | a for (name, fold), texts in answers.items() for a in texts]
        write_samples(output / "answers.jsonl", written)
    _join_samples(plan, outcomes, output)
    write_atomically(output / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return results


def _finished_before(cells: Mapping[Cell, str], output: Path, console: Console) -> dict[Cell, dict[str, Any]]:
    """Return the results of the cells that are finished; name each that is damaged, and is computed again."""
    results = {}
    for (name, fold), key in cells.items():
        try:
            result = finished(output / "cells" / f"{name}-fold{fold}", key)
        except DamagedError as error:
            console.print(f"{error}: this cell is computed again.", highlight=False, markup=False, soft_wrap=True)
            continue
        if result is not None:
            results[name, fold] = result
    return results


def _attempt(
    plan: Plan, row: Row, fold: int, folder: Path, key: str, outcomes: Mapping[Cell, dict[str, Any]]
) -> dict[str, Any]:
    empty = {"samples": [], "effects": {}, "seconds": 0.0, "scoring_seconds": 0.0, "chosen": {}}
    empty |= {"trainable_parameters": 0, "edited_parameters": 0, "adapter_bytes": 0, "texts": {}}
    shutil.rmtree(folder / "adapter", ignore_errors=True)  # what an earlier attempt left
    try:
        for earlier in row.earlier:
            if outcomes[earlier, fold]["failed"]:
                raise RuntimeError(f"it needs {earlier!r}, which failed")
        adapters = {name: folder.parent / f"{name}-fold{fold}" / "adapter" for name in row.earlier}
        result = {"key": key, "failed": None, **run_cell(plan, row, fold, folder, adapters)}
    except Exception as error:  # whatever a method does wrong, the other rows are worth having
        result = {"key": key, "failed": f"{type(error).__name__}: {error}", **empty}
    return write_result(folder, result)


def _join_samples(plan: Plan, outcomes: Mapping[Cell, dict[str, Any]], output: Path) -> None:
    """Write all folds' samples of each row that did not fail to one file a task, in the release's order."""
    for row in plan.rows:
        folds = range(plan.data.num_folds)
        if any(outcomes[row.name, fold]["failed"] for fold in folds):
            continue
        for file in FILES.values():
            samples = [s for fold in folds for s in read_samples(output / "cells" / f"{row.name}-fold{fold}" / file)]
            write_samples(output / "samples" / row.name / file, sorted(samples, key=lambda sample: sample["doc_id"]))
