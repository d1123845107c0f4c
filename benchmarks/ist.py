"""What importance-aware sparse tuning saves: time of a step and memory kept for backward, against LoRA alone.

    python benchmarks/ist.py [--model FOLDER] [--steps 40]

LoRA r=8 on q and v with `IST(LoRA(...), freeze=True)` and by its default, and without. Each side has its own copy of
the model and they take their steps in turn, on the same batches, in one process; who comes first changes each step.
Prints medians of the ratios to LoRA, pair by pair, with their 95% intervals. Memory is the bytes of all tensors that a
step's graph keeps, each once, weights left out.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from pairs import InAThread, Turns, machine, quiet, ratio
from torch import Tensor

from lightning_peft.callbacks import IST, LoRA


class Module(L.LightningModule):
    """A language model that, where it is `measured`, notes the bytes that each step's graph keeps."""

    def __init__(self, model: str) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__()
        self.backbone = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.measured = False
        self.kept: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if not self.measured:
            return self.backbone(**batch).loss
        weights = {tensor.untyped_storage().data_ptr() for tensor in self.backbone.parameters()}
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.backbone(**batch).loss
        if loss.requires_grad:
            self.kept.append(sum(sizes.values()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


def lora() -> LoRA:
    return LoRA(r=8, target_modules=["q_proj", "v_proj"])


def trainer(*callbacks: L.Callback, steps: int) -> L.Trainer:
    return L.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def loader(batches: list[Any]) -> Any:
    return torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def bytes_kept(model: str, callback: L.Callback, batches: list[Any]) -> float:
    """Return the mean bytes that a step's graph keeps."""
    module = Module(model)
    module.measured = True
    trainer(callback, steps=len(batches)).fit(module, loader(batches))
    return statistics.fmean(module.kept)


def lora_alone(model: str, batches: list[Any], step_ends: Callable[[], None]) -> None:
    """Train by LoRA alone, saying when a step ends."""

    class Ends(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:  # type: ignore[override]
            step_ends()

    trainer(lora(), Ends(), steps=len(batches)).fit(Module(model), loader(batches))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    quiet()
    print(machine())
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(100, 40000, (2, 64), generator=generator) for _ in range(arguments.steps)]
    batches = [{"input_ids": row, "labels": row} for row in ids]
    whole = bytes_kept(arguments.model, lora(), batches[:1])
    sides = {
        "IST(freeze=True)": lambda: IST(lora(), freeze=True, seed=0),
        "RST: uniform, freeze=True": lambda: IST(lora(), "uniform", freeze=True, seed=0),
        "IST": lambda: IST(lora(), seed=0),
    }
    for name, make in sides.items():
        kept = bytes_kept(arguments.model, make(), batches[:10]) / whole

        other = InAThread(functools.partial(lora_alone, arguments.model, batches))
        turns = Turns(batches[:-1], other, warm_up=2)  # the other's last step ends without coming back
        trainer(make(), turns, steps=len(batches)).fit(Module(arguments.model), turns)
        other.finish()
        print(f"{name}: time {ratio(turns.ours, turns.theirs)}, memory kept for backward {kept:.2f} of LoRA's")


if __name__ == "__main__":
    main()
