"""One cell of a comparison: one row on one fold, adapted, saved, scored."""

from __future__ import annotations

import copy
import logging
import shutil
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lightning_peft.backbone.window import ContextWindowWarning
from lightning_peft.compare.outside import changed_outside, load_outside, save_outside, trained_outside
from lightning_peft.compare.plan import Plan, Row, row_options
from lightning_peft.fitting.checkpoint_names import META
from lightning_peft.fitting.checkpoints import restore_adapters
from lightning_peft.fitting.find_backbone import find_backbone
from lightning_peft.fitting.multi_phase import MultiPhase
from lightning_peft.fitting.pickles import read_file
from lightning_peft.stack.adapter_files.folder import adapter_folders, read_folder
from lightning_peft.stack.adapter_files.saving import load_adapter, save_adapter
from lightning_peft.stack.stack import adapters, find_stacks, stack_of
from lightning_peft.tasks.cell import Cell
from lightning_peft.tasks.split import Split


def run_cell(plan: Plan, row: Row, fold: int, folder: Path, earlier: Mapping[str, Path]) -> dict[str, Any]:
    """Adapt as the row says on every other fold, score this fold's units, and save what was adapted.

    Args:
        plan: the plan.
        row: the row.
        fold: the fold to test on.
        folder: this cell's folder; the adapter goes to `folder/adapter`, what else was trained beside it.
        earlier: the adapter folders of the rows that this one comes after or starts from.

    Returns:
        JSON-able: what the task's records keep of a cell; `seconds` to adapt and to score; numbers of parameters;
        `chosen` hyperparameters.
    """
    L.seed_everything(plan.seed, verbose=False)
    quiet()
    begin = time.perf_counter()
    cell, chosen, outside = cell_of(plan, row, fold, folder), dict[str, Any](), 0
    if row.callback is None:
        module = _module(plan, row, earlier)
    elif row.edits:
        module, chosen = _edit(plan, row, cell, earlier)
    else:
        module, chosen, outside = _tune(plan, row, cell, earlier)
    seconds = time.perf_counter() - begin
    counts = _save(plan, row, module, folder)
    counts["trainable_parameters"] += outside

    begin = time.perf_counter()
    if row.scoring is not None:
        setattr(module, "scoring", row.scoring)  # noqa: B010 - of the modules whose tasks score choices
    measured = plan.task.records.measure(cell, module)
    if row.scoring is not None:
        chosen = dict(row.scoring.chosen)
    return {
        **measured,
        "seconds": seconds,
        "scoring_seconds": time.perf_counter() - begin,
        "chosen": chosen,
        **counts,
    }


def cell_of(plan: Plan, row: Row, fold: int, folder: Path, result: Mapping[str, Any] | None = None) -> Cell:
    """Return a cell as its task sees it.

    Args:
        plan: the plan.
        row: the cell's row.
        fold: the fold to test on.
        folder: the cell's.
        result: of the finished cell.
    """
    return Cell(
        row=row.name,
        label=row.label,
        kind=row.kind,
        split=Split(fold, plan.task.folds, plan.task.seed),
        folder=folder,
        options=row_options(plan.task, row),
        draws=row.draws,
        adapts=row.callback is not None,
        tuned=row.callback is not None and not row.edits,
        scoring=row.scoring,
        trainer=partial(trainer_of, plan),
        adapted=partial(_adapted, plan, row, folder),
        result={} if result is None else result,
    )


def _edit(plan: Plan, row: Row, cell: Cell, earlier: Mapping[str, Path]) -> tuple[L.LightningModule, dict[str, Any]]:
    """Compute the edit from every other fold, at the strength that is best on the inner validation units."""
    callback, chosen = _callback(row, earlier), {}
    if row.alphas:
        chosen = _choose_alpha(plan, row, cell, earlier)
        callback.alpha = chosen["alpha"]
    module, data = _module(plan, row, earlier), plan.task.data(cell.split, **cell.options_of(0))
    trainer_of(plan, [callback], max_epochs=1, limit_val_batches=0).fit(module, datamodule=data)
    return module, chosen


def _choose_alpha(plan: Plan, row: Row, cell: Cell, earlier: Mapping[str, Path]) -> dict[str, Any]:
    """Measure every strength of the edit that the inner training units give on the inner validation units."""
    task, callback = plan.task, _callback(row, earlier)
    callback.alpha = 1.0
    module, inner = _module(plan, row, earlier), Split(cell.fold, task.folds, task.seed, inner=True)
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


def _tune(
    plan: Plan, row: Row, cell: Cell, earlier: Mapping[str, Path]
) -> tuple[L.LightningModule, dict[str, Any], int]:
    """Try every learning rate until its validation loss stops falling; return the best epoch of the best trial.

    Returns:
        The module; what was chosen; how many parameters were trained outside of adapters.
    """
    folder, monitor = cell.folder / "trials", plan.task.monitor
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
    trials: list[dict[str, Any]] = []
    for rate in row.learning_rates:
        L.seed_everything(plan.seed, verbose=False)  # every trial starts alike
        module = _module(plan, row, earlier)
        setattr(module, "learning_rate", rate)  # noqa: B010 - which no LightningModule declares
        keep = _Keep(folder / f"lr{rate:g}", monitor=monitor, save_top_k=1)
        epochs = _Epochs(monitor)
        callbacks = [_callback(row, earlier), epochs, _Stop(monitor, patience=row.patience), keep]
        trainer = trainer_of(
            plan, callbacks, max_epochs=row.max_epochs, enable_checkpointing=True, val_check_interval=1.0
        )
        trainer.fit(module, datamodule=plan.task.data(cell.split, **cell.options_of(0)))
        losses = epochs.losses
        if not epochs.settled:
            raise ValueError(
                f"No validation was run, but learning rates and epochs are chosen by {monitor!r}: "
                f"{type(plan.task).__name__}.data needs a validation set."
            )
        best = min(epochs.settled, key=losses.__getitem__)
        trials.append({"learning_rate": rate, "epochs": best + 1, "val_losses": losses, "path": keep.best_model_path})
        outside = trained_outside(module)
    winner = min(trials, key=lambda trial: trial["val_losses"][trial["epochs"] - 1])
    best_module = _restored(plan.task.module(), Path(winner["path"]))
    shutil.rmtree(folder)
    for trial in trials:
        del trial["path"]
    chosen = {"learning_rate": winner["learning_rate"], "epochs": winner["epochs"], "trials": trials}
    return best_module, chosen, outside


def _restored(module: L.LightningModule, path: Path) -> L.LightningModule:
    """Return a fresh module with the weights, and any adapters, of a checkpoint."""
    checkpoint, adapted = read_file(path), False
    if META in checkpoint:
        restore_adapters(module, checkpoint, str(path))
        adapted = True
    module.load_state_dict(checkpoint["state_dict"], strict=not adapted)
    return module


def _module(plan: Plan, row: Row, earlier: Mapping[str, Path]) -> L.LightningModule:
    """Return the task's module, on the earlier row's adapter where the row comes after one."""
    module = plan.task.module()
    if row.after is not None:
        below = next(other for other in plan.rows if other.name == row.after)
        if earlier[row.after].exists():
            backbone = _backbone(module, below)
            load_adapter(backbone, earlier[row.after], name=row.after)
            stack_of(backbone).freeze()
        load_outside(module, earlier[row.after].parent)
    return module


def _adapted(plan: Plan, row: Row, folder: Path) -> L.LightningModule:
    """Return the module with what a finished cell has saved."""
    module = plan.task.module()
    if (folder / "adapter").exists():
        load_adapter(_backbone(module, row), folder / "adapter")
    load_outside(module, folder)
    return module


def _backbone(module: L.LightningModule, row: Row) -> Any:
    """Return the submodule that the row's callback adapts."""
    return module.get_submodule(find_backbone(module, getattr(row.callback, "backbone", None)) or "")


def _callback(row: Row, earlier: Mapping[str, Path]) -> Any:
    """Return the row's callback for one fit, starting from the earlier row's adapter where it is to."""
    callback: Any = copy.deepcopy(row.callback)
    if row.starts_from is not None:
        callback.init_from = str(earlier[row.starts_from])
    return callback


def quiet() -> None:
    """Silence what each of a dozen Trainers would say of devices and data workers."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`configure_optimizers` returned `None`.*")
    warnings.filterwarnings("ignore", category=ContextWindowWarning)  # it was said before the first cell


def trainer_of(plan: Plan, callbacks: list[Callback], **options: Any) -> L.Trainer:
    """Return a Trainer that logs and saves nothing unless options say so."""
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    settings |= {"accelerator": plan.accelerator, "devices": 1, "num_sanity_val_steps": 0}
    return L.Trainer(callbacks=callbacks, **(settings | options))


def _save(plan: Plan, row: Row, module: L.LightningModule, folder: Path) -> dict[str, int]:
    """Save what a row has adapted; count tuned and edited parameters, and the bytes of all tensors saved."""
    counts = {"trainable_parameters": 0, "edited_parameters": 0, "adapter_bytes": 0}
    if row.callback is None:
        return counts
    if find_stacks(module):
        save_adapter(module, folder / "adapter")
        for part, path in zip(adapters(module).parts, adapter_folders(folder / "adapter"), strict=True):
            tensors = read_folder(path)[1]
            # frozen directions, masks and indices are saved beside what is trained
            counted = [t for key, t in tensors.items() if part.computed or key in part.injection.trained]
            counts["edited_parameters" if part.computed else "trainable_parameters"] += sum(t.numel() for t in counted)
            counts["adapter_bytes"] += sum(t.nbytes for t in tensors.values())
    outside = changed_outside(module, plan.task.module)
    save_outside(folder, outside)
    counts["adapter_bytes"] += sum(tensor.nbytes for tensor in outside.values())
    return counts


class _Epochs(Callback):
    """Keep every epoch's validation loss, and which epochs, counted from 0, are of the last phase."""

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self.losses: list[float] = []
        self.settled: list[int] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"{type(pl_module).__name__} logs no {self.monitor!r} in validation, which learning rates and epochs "
                f"are chosen by; it logs {', '.join(trainer.callback_metrics) or 'nothing'}."
            )
        if _settled(trainer):
            self.settled.append(len(self.losses))
        self.losses.append(float(trainer.callback_metrics[self.monitor]))


class _Stop(EarlyStopping):
    """Stop training in its last phase only, not in LoFiT's scales or LT-SFT's full fine-tuning."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _settled(trainer):
            super().on_validation_end(trainer, pl_module)


class _Keep(ModelCheckpoint):
    """Keep nothing of a phase that is not the last, however low its loss: it is not the method's result."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _settled(trainer):
            super().on_validation_end(trainer, pl_module)


def _settled(trainer: L.Trainer) -> bool:
    callbacks = getattr(trainer, "callbacks", [])
    return all(callback.settled for callback in callbacks if isinstance(callback, MultiPhase))
