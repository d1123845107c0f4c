"""The time of a training step against a hand-written peft loop, and against the Trainer of transformers with peft.

    python benchmarks/step_time.py [--model FOLDER] [--steps 80] [--quick]

LoRA r=8 on q and v. Both sides have their own copy of the model and take their steps in turn, on the same batches, in
one process; who comes first changes with every step. Prints the median of the ratios, pair by pair, with its 95%
interval, and whether the upper bound is at most 1.02; and whether the losses equal the hand-written loop's bit for bit.
About 10 minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from pairs import InAThread, Turns, machine, milliseconds, quiet, ratio, verdict
from torch import Tensor

from lightning_peft.callbacks import LoRA

TARGETS = ["q_proj", "v_proj"]
BOUND = 1.02


class Module(L.LightningModule):
    """What a user would write."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.losses: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.backbone(**batch).loss
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def adapted(model: str) -> Any:
    from peft import LoraConfig, get_peft_model

    backbone = load(model)
    torch.manual_seed(0)
    return get_peft_model(backbone, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))


def load(model: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def hand_written(model: str) -> tuple[Callable[[Any], None], list[Tensor]]:
    """One step of the loop that anyone would write, and its losses."""
    backbone = adapted(model)
    optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=1e-3)
    losses: list[Tensor] = []

    def step(batch: dict[str, Tensor]) -> None:
        loss = backbone(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    return step, losses


def trainer_of_transformers(model: str, batches: list[Any]) -> InAThread:
    """The Trainer with what it does beside the same training switched off: clipping, schedule, logs, checkpoints."""
    import transformers as t

    class Trainer(t.Trainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    class Ends(t.TrainerCallback):
        def __init__(self, ends: Callable[[], None]) -> None:
            self.ends = ends

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends()

    def loop(ends: Callable[[], None]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            arguments = t.TrainingArguments(
                output_dir=folder,
                max_steps=len(batches),
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                optim="adamw_torch",
                max_grad_norm=0.0,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            )
            Trainer(adapted(model), arguments, train_dataset=batches, callbacks=[Ends(ends)]).train()

    return InAThread(loop)


def ours(model: str, turns: Turns) -> list[Tensor]:
    module = Module(load(model))
    torch.manual_seed(0)
    trainer = L.Trainer(
        callbacks=[LoRA(r=8, alpha=16, target_modules=TARGETS), turns],
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, turns)
    return module.losses


def report(name: str, turns: Turns) -> None:
    found = ratio(turns.ours, turns.theirs)
    print(f"\nours {milliseconds(turns.ours)}, {name} {milliseconds(turns.theirs)}")
    print(f"step time, ours / {name}: {found}")
    verdict(f"the upper bound is at most {BOUND}", found.high <= BOUND)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="a few small steps, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rows, options.tokens = 6, 1, 16
    quiet()

    generator = torch.Generator().manual_seed(0)
    warm_up = max(2, options.steps // 10)
    batches = []
    for _ in range(options.steps + warm_up):
        ids = torch.randint(5, 10_000, (options.rows, options.tokens), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    print(f"{machine()}\n{options.rows} rows of {options.tokens} tokens, {options.steps} steps after {warm_up}")

    step, losses = hand_written(options.model)
    turns = Turns(batches, step, warm_up)
    found = ours(options.model, turns)
    report("hand-written loop", turns)
    verdict(
        "the losses are those of the hand-written loop, bit for bit",
        torch.equal(torch.stack(found), torch.stack(losses)),
    )
    del step, losses

    other = trainer_of_transformers(options.model, batches)
    turns = Turns(batches[:-1], other, warm_up)  # its last step ends without coming back
    ours(options.model, turns)
    other.finish()
    report("transformers' Trainer", turns)


if __name__ == "__main__":
    main()
