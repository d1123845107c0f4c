"""One cell of a comparison: one row on one fold, adapted, saved, scored."""

from __future__ import annotations

import copy
import logging
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_peft.backbone.window import ContextWindowWarning, exceeding, lengths_of, loaded
from lightning_peft.compare.plan import Plan, Row
from lightning_peft.fitting.multi_phase import MultiPhase
from lightning_peft.models import CausalLM
from lightning_peft.stack.adapter_files.folder import adapter_folders, read_folder
from lightning_peft.stack.adapter_files.saving import load_adapter, save_adapter
from lightning_peft.stack.stack import adapters, find_stacks, stack_of
from lightning_peft.truthfulqa import MC2, ChoiceScorer, Evaluate, SampleWriter, TruthfulQADataModule
from lightning_peft.truthfulqa.metrics import mc1


def run_cell(plan: Plan, row: Row, fold: int, folder: Path, earlier: Mapping[str, Path]) -> dict[str, Any]:
    """Adapt as the row says on every other fold, score this fold's questions, and save the adapter.

    Args:
        plan: the plan.
        row: the row.
        fold: the fold to test on.
        folder: this cell's folder; the adapter goes to `folder/adapter`, and here what `SampleWriter` writes of the
            first draw of demonstrations.
        earlier: the adapter folders of the rows that this one comes after or starts from.

    Returns:
        JSON-able: `samples`, one for each choice and draw; `effects`, what else was measured; `seconds` to adapt and to
        score; numbers of parameters; `chosen` hyperparameters; `texts`, how many demonstrations stood before questions,
        of how many, where that was to fit, and what was beyond the context window.
    """
    L.seed_everything(plan.seed, verbose=False)
    quiet()
    begin = time.perf_counter()
    chosen: dict[str, Any] = {}
    if row.callback is None:
        module = _module(plan, row, earlier)
    elif row.edits:
        module, chosen = _edit(plan, row, fold, earlier)
    else:
        module, chosen = _tune(plan, row, fold, folder, earlier)
    seconds = time.perf_counter() - begin
    if find_stacks(module):
        save_adapter(module, folder / "adapter")

    begin = time.perf_counter()
    # a prompt or another scoring leaves the model as it is, and the base is the same in every fold
    effects = plan.data.side_effects if row.callback is not None or (row.kind == "base" and fold == 0) else None
    samples, shown, beyond = _Samples(), [], None
    for draw in range(row.draws):
        samples.draw, data = draw, data_of(plan, row, fold, draw)
        data.side_effects = effects if draw == 0 else None
        writer = SampleWriter(folder if draw == 0 else None)
        trainer = trainer_of(plan, [samples, writer, Evaluate(row.scoring)])
        trainer.test(module, datamodule=data, verbose=False)
        shown += [data.demonstrations] if data.demonstrations else []
        batches = [batch for batch in loaded(trainer.test_dataloaders) if "document" not in batch]
        beyond = beyond or exceeding(module.backbone, (n for batch in batches for n in lengths_of(batch)), "test texts")
    if row.scoring is not None:
        chosen = dict(row.scoring.chosen)
    questions = {question.id: question for question in data.test_questions}
    for sample in samples.rows:
        question = questions[sample["question_id"]]
        choice = question.choices[sample.pop("index")]
        sample |= {"method": row.name, "fold": fold, "question": question.text, "category": question.category}
        sample["choice"] = choice.text
    counts = _counts(module, folder / "adapter")
    return {
        "samples": samples.rows,
        "effects": {"documents": samples.documents, "capability": samples.capability},
        "seconds": seconds,
        "scoring_seconds": time.perf_counter() - begin,
        "chosen": chosen,
        "texts": {"demonstrations": shown, "beyond": beyond},
        **counts,
    }


def _edit(plan: Plan, row: Row, fold: int, earlier: Mapping[str, Path]) -> tuple[CausalLM, dict[str, Any]]:
    """Compute the edit from every other fold, at the strength that is best on the inner validation questions."""
    callback, chosen = _callback(row, earlier), {}
    if row.alphas:
        chosen = _choose_alpha(plan, row, fold, earlier)
        callback.alpha = chosen["alpha"]
    module = _module(plan, row, earlier)
    trainer_of(plan, [callback], max_epochs=1, limit_val_batches=0).fit(module, datamodule=data_of(plan, row, fold))
    return module, chosen


def _choose_alpha(plan: Plan, row: Row, fold: int, earlier: Mapping[str, Path]) -> dict[str, Any]:
    """Score every strength of the edit that the inner training questions give on the inner validation questions."""
    callback = _callback(row, earlier)
    callback.alpha = 1.0
    module, data = _module(plan, row, earlier), data_of(plan, row, fold)
    data.tokenizer = module.tokenizer
    data.setup()
    data.val_questions, data.test_questions = [], data.val_questions
    if row.few_shot is not None:
        data.few_shot = min(row.few_shot, len(data.train_questions))
    trainer_of(plan, [callback], max_epochs=1, limit_val_batches=0).fit(module, datamodule=data)
    module.eval()
    trials = []
    for alpha in row.alphas:
        stack_of(module.backbone).scale(alpha, callback.name)
        scorer, metric = ChoiceScorer(module.backbone), MC2()
        for batch in data.test_dataloader():
            scores = scorer.score(batch["input_ids"], batch["attention_mask"], batch["labels"])
            metric.update(scores, batch["mc2"], batch["group"])
        trials.append({"alpha": alpha, "val_mc2": float(metric.compute())})
    best = max(trials, key=lambda trial: (trial["val_mc2"], -abs(trial["alpha"])))
    return {"alpha": best["alpha"], "trials": trials}


def _tune(
    plan: Plan, row: Row, fold: int, folder: Path, earlier: Mapping[str, Path]
) -> tuple[CausalLM, dict[str, Any]]:
    """Try every learning rate until its validation loss stops falling; return the best epoch of the best trial."""
    shutil.rmtree(folder / "trials", ignore_errors=True)  # what a killed run left
    trials: list[dict[str, Any]] = []
    for rate in row.learning_rates:
        L.seed_everything(plan.seed, verbose=False)  # every trial starts alike
        module = _module(plan, row, earlier)
        module.learning_rate = rate
        stop = _Stop("val_loss", patience=row.patience)
        keep = _Keep(folder / "trials" / f"lr{rate:g}", monitor="val_loss", save_top_k=1)
        epochs = _Epochs()
        callbacks = [_callback(row, earlier), stop, keep, epochs]
        trainer = trainer_of(
            plan, callbacks, max_epochs=row.max_epochs, enable_checkpointing=True, val_check_interval=1.0
        )
        trainer.fit(module, datamodule=data_of(plan, row, fold))
        losses = epochs.losses
        best = min(epochs.settled, key=losses.__getitem__)
        trials.append({"learning_rate": rate, "epochs": best + 1, "val_losses": losses, "path": keep.best_model_path})
    winner = min(trials, key=lambda trial: trial["val_losses"][trial["epochs"] - 1])
    best_module = CausalLM.load_from_checkpoint(winner["path"], map_location="cpu", weights_only=True)
    shutil.rmtree(folder / "trials")
    for trial in trials:
        del trial["path"]
    return best_module, {"learning_rate": winner["learning_rate"], "epochs": winner["epochs"], "trials": trials}


def _module(plan: Plan, row: Row, earlier: Mapping[str, Path]) -> CausalLM:
    module = CausalLM(plan.model, dtype=plan.dtype)
    if row.after is not None:
        load_adapter(module.backbone, earlier[row.after], name=row.after)
        stack_of(module.backbone).freeze()
    return module


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


def data_of(plan: Plan, row: Row, fold: int, draw: int = 0) -> TruthfulQADataModule:
    """Return a row's questions, the fold's apart from the others, after its demonstrations in this draw."""
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
        draw=draw,
        protocol=plan.data.protocol,
        fit_window=plan.data.fit_window,
    )


def trainer_of(plan: Plan, callbacks: list[Callback], **options: Any) -> L.Trainer:
    """Return a Trainer that logs and saves nothing unless options say so."""
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    settings |= {"accelerator": plan.accelerator, "devices": 1, "num_sanity_val_steps": 0}
    return L.Trainer(callbacks=callbacks, **(settings | options))


def _counts(module: CausalLM, folder: Path) -> dict[str, int]:
    """Count the tuned and edited parameters of the result, and the bytes of all its tensors as saved in `folder`."""
    counts = {"trainable_parameters": 0, "edited_parameters": 0, "adapter_bytes": 0}
    if find_stacks(module):
        for part, path in zip(adapters(module).parts, adapter_folders(folder), strict=True):
            tensors = read_folder(path)[1]
            # frozen directions, masks and indices are saved beside what is trained
            counted = [t for key, t in tensors.items() if part.computed or key in part.injection.trained]
            counts["edited_parameters" if part.computed else "trainable_parameters"] += sum(t.numel() for t in counted)
            counts["adapter_bytes"] += sum(t.nbytes for t in tensors.values())
    return counts


class _Samples(Callback):
    """Keep every choice's log-probability, every document's effects and whether each simple question was answered."""

    def __init__(self) -> None:
        self.draw = 0  # of the demonstrations
        self.rows: list[dict[str, Any]] = []
        self.documents: list[list[float]] = []  # tokens, cross-entropy of the base and of the adapted model, KL
        self.capability: dict[int, float] = {}

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Tensor], *_: object
    ) -> None:
        if "document" in batch:
            self.documents += outputs.tolist()
            return
        if "capability" in batch:
            self.capability[int(batch["group"][0])] = mc1(outputs, batch["capability"].cpu())
            return
        for index, logprob in enumerate(outputs.tolist()):
            row = {"question_id": int(batch["group"][index]), "index": int(batch["choice"][index])}
            row |= {"draw": self.draw, "logprob": logprob}
            self.rows.append(row | {name: int(batch[name][index]) for name in ("mc0", "mc1", "mc2")})


class _Epochs(Callback):
    """Keep every epoch's validation loss, and which epochs, counted from 0, are of the last phase."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.settled: list[int] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _settled(trainer):
            self.settled.append(len(self.losses))
        self.losses.append(float(trainer.callback_metrics["val_loss"]))


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
