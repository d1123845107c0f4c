"""Later epochs with the frozen trunk cache against peft's LoRA on the same blocks without it.

    python benchmarks/trunk_cache.py [--model FOLDER] [--epochs 6] [--quick]

LoRA r=8 on q and v of the last two blocks. The other side is a hand-written loop with peft, on its own copy of the
model; both take their steps in turn, on the same batches, in one process. Three trainings: the language-model loss on
every token; the loss on answer tokens only, for which alone both sides run the language-model head; a classifier on the
mean of the last states. The first epoch fills the cache and is not counted. Prints the median over the further epochs
of the ratio of their times, and the largest relative difference of the losses. About 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from pairs import Turns, machine, quiet, ratio, verdict
from torch import Tensor, nn

from lightning_peft.callbacks import LoRA, TrunkCache

TARGETS = ["q_proj", "v_proj"]
ANSWER = 8  # tokens at the end of each row
BOUNDS = {"every token": 2.0, "answers": 4.0, "classifier": 4.0}


class Model(nn.Module):
    """A backbone and the loss of one of the three trainings; both sides run it."""

    def __init__(self, kind: str, model: str) -> None:
        super().__init__()
        import transformers as t

        auto = t.AutoModel if kind == "classifier" else t.AutoModelForCausalLM
        self.backbone: Any = auto.from_pretrained(model, dtype=torch.float32)
        self.kind = kind
        if kind == "classifier":
            torch.manual_seed(1)
            self.head = nn.Linear(self.backbone.config.hidden_size, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        if self.kind == "classifier":
            states = self.backbone(**inputs).last_hidden_state * mask[..., None]
            return nn.functional.cross_entropy(self.head(states.sum(1) / mask.sum(1, keepdim=True)), batch["classes"])
        kept = ANSWER + 1 if self.kind == "answers" else 0
        logits = self.backbone(**inputs, logits_to_keep=kept).logits[:, :-1]
        targets = ids[:, -kept:][:, 1:] if kept else ids[:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Module(L.LightningModule):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.losses = model, []  # type: ignore[var-annotated]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def with_peft(model: Model, layers: list[int]) -> tuple[Callable[[Any], None], list[float]]:
    """One step of the hand-written loop, and its losses."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    numbers, names = "|".join(map(str, layers)), "|".join(TARGETS)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=rf"(.*\.)?layers\.({numbers})\.self_attn\.({names})")
    model.backbone = get_peft_model(model.backbone, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses: list[float] = []

    def step(batch: Any) -> None:
        loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    return step, losses


def compare(kind: str, options: argparse.Namespace, batches: list[Any]) -> None:
    other, module = Model(kind, options.model), Module(Model(kind, options.model))
    depth = other.backbone.config.num_hidden_layers
    layers = [depth - 2, depth - 1]
    step, losses = with_peft(other, layers)
    turns = Turns(batches, step, warm_up=len(batches))
    torch.manual_seed(0)
    trainer = L.Trainer(
        callbacks=[
            LoRA(r=8, alpha=16, target_modules=TARGETS, layers=layers, backbone="model.backbone"),
            TrunkCache(),
            turns,
        ],
        accelerator="cpu",
        max_epochs=options.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, turns)

    def by_epoch(times: list[float]) -> list[float]:
        return [sum(times[i : i + len(batches)]) for i in range(0, len(times), len(batches))]

    ours, theirs = by_epoch(turns.ours), by_epoch(turns.theirs)
    found = ratio(theirs, ours)
    difference = max(abs(a - b) / abs(b) for a, b in zip(module.losses, losses, strict=True))
    print(f"\n{kind}, blocks {layers} of {depth}: epochs of {ours[0]:.2f} s, without the cache {theirs[0]:.2f} s")
    print(f"time without the cache / with it: {found}")
    verdict(f"at least {BOUNDS[kind]} times as fast", found.median >= BOUNDS[kind])
    verdict(f"losses equal to 1e-5 relative (largest difference {difference:.1e})", difference <= 1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--epochs", type=int, default=6, help="the first, which fills the cache, included")
    parser.add_argument("--batches", type=int, default=8, help="in an epoch")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="a few small steps, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.batches, options.rows, options.tokens = 3, 2, 2, 24
    quiet()

    generator = torch.Generator().manual_seed(0)
    shape = (options.batches, options.rows, options.tokens)
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "classes": ids[:, 0] % 2}
        for ids in torch.randint(5, 10_000, shape, generator=generator)
    ]
    print(f"{machine()}\n{options.batches} batches of {options.rows} rows of {options.tokens} tokens")
    for kind in BOUNDS:
        compare(kind, options, batches)


if __name__ == "__main__":
    main()
