"""What a cell begins with: the task's module, on an earlier row's adapter; the row's callback; a Trainer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_peft.compare.outside import load_outside
from lightning_peft.compare.plan import Plan, Row
from lightning_peft.fitting.find_backbone import find_backbone
from lightning_peft.stack.adapter_files.saving import load_adapter
from lightning_peft.stack.stack import stack_of
from lightning_peft.tasks.cell import Cell


def module_of(plan: Plan, row: Row, cell: Cell, earlier: Mapping[str, Path]) -> L.LightningModule:
    """Return the task's module, on the earlier row's adapter where the row comes after one."""
    module = plan.task.seeded_module(cell.seed)
    if row.after is not None:
        below = next(other for other in plan.rows if other.name == row.after)
        if earlier[row.after].exists():
            backbone = _backbone(module, below)
            load_adapter(backbone, earlier[row.after], name=row.after)
            stack_of(backbone).freeze()
        load_outside(module, earlier[row.after].parent)
    return module


def adapted(plan: Plan, row: Row, folder: Path, seed: int) -> L.LightningModule:
    """Return the module with what a finished cell has saved."""
    module = plan.task.seeded_module(seed)
    if (folder / "adapter").exists():
        load_adapter(_backbone(module, row), folder / "adapter")
    load_outside(module, folder)
    return module


def callback_of(row: Row, earlier: Mapping[str, Path]) -> Any:
    """Return the row's callback for one fit, starting from the earlier row's adapter where it is to."""
    callback: Any = copy.deepcopy(row.callback)
    if row.starts_from is not None:
        callback.init_from = str(earlier[row.starts_from])
    return callback


def trainer_of(plan: Plan, callbacks: list[Callback], **options: Any) -> L.Trainer:
    """Return a Trainer that logs and saves nothing unless options say so."""
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    settings |= {"accelerator": plan.accelerator, "devices": 1, "num_sanity_val_steps": 0}
    return L.Trainer(callbacks=callbacks, **(settings | options))


def _backbone(module: L.LightningModule, row: Row) -> Any:
    """Return the submodule that the row's callback adapts."""
    return module.get_submodule(find_backbone(module, getattr(row.callback, "backbone", None)) or "")
