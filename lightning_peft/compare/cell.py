"""One cell of a comparison: one row on one fold, adapted, saved, scored."""

from __future__ import annotations

import copy
import logging
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_peft.compare.plan import Plan, Row
from lightning_peft.models import CausalLM
from lightning_peft.truthfulqa import TruthfulQADataModule
from lightning_peft.tuners.saving import load_adapter, save_adapter
from lightning_peft.tuners.stack import adapters, find_stacks, stack_of


def run_cell(plan: Plan, row: Row, fold: int, folder: Path, below: Path | None) -> dict[str, Any]:
    """Adapt as the row says on every other fold, score this fold's questions, and save the adapter.

    Args:
        plan: the plan.
        row: the row.
        fold: the fold to test on.
        folder: this cell's folder; the adapter goes to `folder/adapter`.
        below: the adapter folder of the row that this one comes after.

    Returns:
        JSON-able: `samples`, one for each choice; `seconds` to adapt and to score; numbers of parameters; `chosen`
        hyperparameters.
    """
    L.seed_everything(plan.seed, verbose=False)
    # a dozen Trainers would each say which devices there are and that no data workers were asked for
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`configure_optimizers` returned `None`.*")
    begin = time.perf_counter()
    chosen: dict[str, Any] = {}
    if row.callback is None or row.edits:
        module = _module(plan, row, below)
        if row.callback is not None:
            trainer = _trainer(plan, [copy.deepcopy(row.callback)], max_epochs=1, limit_val_batches=0)
            trainer.fit(module, datamodule=_data(plan, row, fold))
    else:
        module, chosen = _tune(plan, row, fold, folder, below)
    seconds = time.perf_counter() - begin
    if find_stacks(module):
        save_adapter(module, folder / "adapter")

    begin = time.perf_counter()
    samples = _Samples()
    data = _data(plan, row, fold)
    _trainer(plan, [samples]).test(module, datamodule=data, verbose=False)
    questions = {question.id: question for question in data.test_questions}
    for sample in samples.rows:
        question = questions[sample["question_id"]]
        choice = question.choices[sample.pop("index")]
        sample |= {"method": row.name, "fold": fold, "question": question.text, "category": question.category}
        sample["choice"] = choice.text
    counts = _counts(module)
    return {
        "samples": samples.rows,
        "seconds": seconds,
        "scoring_seconds": time.perf_counter() - begin,
        "chosen": chosen,
        **counts,
    }


def _tune(plan: Plan, row: Row, fold: int, folder: Path, below: Path | None) -> tuple[CausalLM, dict[str, Any]]:
    """Try every learning rate until its validation loss stops falling; return the best epoch of the best trial."""
    shutil.rmtree(folder / "trials", ignore_errors=True)  # what a killed run left
    trials: list[dict[str, Any]] = []
    for rate in row.learning_rates:
        L.seed_everything(plan.seed, verbose=False)  # every trial starts alike
        module = _module(plan, row, below)
        module.learning_rate = rate
        stop = EarlyStopping("val_loss", patience=row.patience)
        keep = ModelCheckpoint(folder / "trials" / f"lr{rate:g}", monitor="val_loss", save_top_k=1)
        epochs = _Epochs()
        callbacks = [copy.deepcopy(row.callback), stop, keep, epochs]
        trainer = _trainer(
            plan, callbacks, max_epochs=row.max_epochs, enable_checkpointing=True, val_check_interval=1.0
        )
        trainer.fit(module, datamodule=_data(plan, row, fold))
        losses = epochs.losses
        best = min(range(len(losses)), key=losses.__getitem__)
        trials.append({"learning_rate": rate, "epochs": best + 1, "val_losses": losses, "path": keep.best_model_path})
    winner = min(trials, key=lambda trial: trial["val_losses"][trial["epochs"] - 1])
    best_module = CausalLM.load_from_checkpoint(winner["path"], map_location="cpu", weights_only=True)
    shutil.rmtree(folder / "trials")
    for trial in trials:
        del trial["path"]
    return best_module, {"learning_rate": winner["learning_rate"], "epochs": winner["epochs"], "trials": trials}


def _module(plan: Plan, row: Row, below: Path | None) -> CausalLM:
    module = CausalLM(plan.model, dtype=plan.dtype)
    if below is not None:
        load_adapter(module.backbone, below, name=row.after)
        stack_of(module.backbone).freeze()
    return module


def _data(plan: Plan, row: Row, fold: int) -> TruthfulQADataModule:
    return TruthfulQADataModule(
        source=plan.data.source,
        train="statements" if row.edits else "answers",
        fold=fold,
        num_folds=plan.data.num_folds,
        val_fraction=plan.data.val_fraction,
        seed=plan.data.seed,
        limit=plan.data.limit,
        batch_size=row.batch_size,
        few_shot=row.few_shot,
    )


def _trainer(plan: Plan, callbacks: list[Any], **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    settings |= {"accelerator": plan.accelerator, "devices": 1, "num_sanity_val_steps": 0}
    return L.Trainer(callbacks=callbacks, **(settings | options))


def _counts(module: CausalLM) -> dict[str, int]:
    """Tuned and edited parameters, and the bytes of all adapter tensors."""
    counts = {"trainable_parameters": 0, "edited_parameters": 0, "adapter_bytes": 0}
    if find_stacks(module):
        stack = adapters(module)
        for part in stack.parts:
            tensors = stack.tensors(part).values()
            kind = "edited_parameters" if part.computed else "trainable_parameters"
            counts[kind] += sum(t.numel() for t in tensors)
            counts["adapter_bytes"] += sum(t.numel() * t.element_size() for t in tensors)
    return counts


class _Samples(Callback):
    """Keeps every choice's log-probability."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Tensor], *_: Any
    ) -> None:
        for index, logprob in enumerate(outputs.tolist()):
            row = {"question_id": int(batch["question_id"][index]), "index": index, "logprob": logprob}
            self.rows.append(row | {name: int(batch[name][index]) for name in ("mc0", "mc1", "mc2")})


class _Epochs(Callback):
    """Keeps every epoch's validation loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.losses.append(float(trainer.callback_metrics["val_loss"]))
