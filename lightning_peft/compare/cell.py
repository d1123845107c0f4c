"""One cell of a comparison: one row on one fold, adapted, saved, scored."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

from lightning_peft.backbone.window import ContextWindowWarning
from lightning_peft.compare.beginning import adapted, callback_of, module_of, trainer_of
from lightning_peft.compare.outside import changed_outside, save_outside
from lightning_peft.compare.plan import Plan, Row, row_options
from lightning_peft.compare.tuning import tune
from lightning_peft.stack.adapter_files.folder import adapter_folders, read_folder
from lightning_peft.stack.adapter_files.saving import save_adapter
from lightning_peft.stack.stack import adapters, find_stacks
from lightning_peft.tasks.arguments import option_names
from lightning_peft.tasks.cell import Cell
from lightning_peft.tasks.split import Split


def run_cell(
    plan: Plan, row: Row, fold: int, folder: Path, earlier: Mapping[str, Path], seed: int | None = None
) -> dict[str, Any]:
    """Adapt as the row says on every other fold, score this fold's units, and save what was adapted.

    Args:
        plan: the plan.
        row: the row.
        fold: the fold to test on.
        folder: this cell's folder; the adapter goes to `folder/adapter`, what else was trained beside it.
        earlier: the adapter folders of the rows that this one comes after or starts from.
        seed: of everything random in the cell; default the plan's first.

    Returns:
        JSON-able: what the task's records keep of a cell; `seconds` to adapt and to score; numbers of parameters;
        `chosen` hyperparameters.
    """
    cell, chosen, outside = cell_of(plan, row, fold, folder, seed=seed), dict[str, Any](), 0
    L.seed_everything(cell.seed, verbose=False)
    quiet()
    begin, cost = time.perf_counter(), dict[str, float]()
    if row.callback is None:
        module = module_of(plan, row, cell, earlier)
    elif row.edits:
        module, chosen = _edit(plan, row, cell, earlier)
    else:
        module, chosen, outside, cost = tune(plan, row, cell, earlier)
    seconds = time.perf_counter() - begin
    counts = _save(plan, row, module, cell)
    counts["trainable_parameters"] += outside

    begin = time.perf_counter()
    measured = plan.task.records.measure(cell, module)
    if row.scoring is not None:
        chosen = dict(row.scoring.chosen)
    return {
        **measured,
        "seconds": seconds,
        "scoring_seconds": time.perf_counter() - begin,
        "chosen": chosen,
        **counts,
        **cost,
    }


def cell_of(
    plan: Plan,
    row: Row,
    fold: int,
    folder: Path,
    result: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> Cell:
    """Return a cell as its task sees it.

    Args:
        plan: the plan.
        row: the cell's row.
        fold: the fold to test on.
        folder: the cell's.
        result: of the finished cell.
        seed: of everything random in the cell; default the plan's first.
    """
    seed = plan.all_seeds[0] if seed is None else seed
    taken = option_names(plan.task.data)
    seeded = {"seed": seed} if taken is not None and "seed" in taken else {}
    return Cell(
        row=row.name,
        label=row.label,
        kind=row.kind,
        split=Split(fold, plan.task.folds, plan.task.seed),
        folder=folder,
        options=row_options(plan.task, row) | seeded,
        draws=row.draws,
        adapts=row.callback is not None,
        tuned=row.callback is not None and not row.edits,
        scoring=row.scoring,
        trainer=partial(trainer_of, plan),
        adapted=partial(adapted, plan, row, folder, seed),
        result={} if result is None else result,
        seed=seed,
    )


def _edit(plan: Plan, row: Row, cell: Cell, earlier: Mapping[str, Path]) -> tuple[L.LightningModule, dict[str, Any]]:
    """Compute the edit from every other fold, at the strength that is best on the inner validation units."""
    callback, chosen = callback_of(row, earlier), {}
    if row.alphas:
        chosen = _choose_alpha(plan, row, cell, earlier)
        callback.alpha = chosen["alpha"]
    module, data = module_of(plan, row, cell, earlier), plan.task.data(cell.split, **cell.options_of(0))
    trainer_of(plan, [callback], max_epochs=1, limit_val_batches=0).fit(module, datamodule=data)
    return module, chosen


def _choose_alpha(plan: Plan, row: Row, cell: Cell, earlier: Mapping[str, Path]) -> dict[str, Any]:
    """Measure every strength of the edit that the inner training units give on the inner validation units."""
    task, callback = plan.task, callback_of(row, earlier)
    callback.alpha = 1.0
    module, inner = module_of(plan, row, cell, earlier), Split(cell.fold, task.folds, task.seed, inner=True)
    data, trials = task.data(inner, **cell.options_of(0)), []
    trainer_of(plan, [callback], max_epochs=1, limit_val_batches=0).fit(module, datamodule=data)
    for alpha in row.alphas:
        adapters(module).scale(alpha, callback.name)
        scores = task.scores()
        cell.test(module, data, scores)
        value = task.records.value(task.primary, task.records.checked(scores))
        trials.append({"alpha": alpha, f"val_{task.primary}": value})
    better = task.measures[task.primary].better
    best = max(trials, key=lambda trial: (better * trial[f"val_{task.primary}"], -abs(trial["alpha"])))
    return {"alpha": best["alpha"], "trials": trials}


def quiet() -> None:
    """Silence what each of a dozen Trainers would say of devices and data workers."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training.*")  # a frozen one
    warnings.filterwarnings("ignore", message=".*configure_optimizers` returned `None`.*")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")  # Lightning calls torch so
    warnings.filterwarnings("ignore", category=ContextWindowWarning)  # it was said before the first cell


def _save(plan: Plan, row: Row, module: L.LightningModule, cell: Cell) -> dict[str, int]:
    """Save what a row has adapted; count tuned and edited parameters, and the bytes of all tensors saved."""
    counts, folder = {"trainable_parameters": 0, "edited_parameters": 0, "adapter_bytes": 0}, cell.folder
    if row.callback is None:
        return counts
    if find_stacks(module):
        save_adapter(module, folder / "adapter")
        for part, path in zip(adapters(module).parts, adapter_folders(folder / "adapter"), strict=True):
            tensors = read_folder(path)[1]
            if part.computed:
                counts["edited_parameters"] += sum(t.numel() for t in tensors.values())
            else:
                counts["trainable_parameters"] += part.injection.count_trained(tensors)
            counts["adapter_bytes"] += sum(t.nbytes for t in tensors.values())
    outside = changed_outside(module, partial(plan.task.seeded_module, cell.seed))
    save_outside(folder, outside)
    counts["adapter_bytes"] += sum(tensor.nbytes for tensor in outside.values())
    return counts
