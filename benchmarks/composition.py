"""Two tasks learnt apart and added: θ + φA + φB, against training both together and against each alone.

    python benchmarks/composition.py cells --model FOLDER [--seeds 0 1 2] [--output FOLDER]
    python benchmarks/composition.py report [--output FOLDER]

One encoder, two tasks on the same notices (`package:notices`): A, the kind of thing looked for (4 classes), and B,
which thing is named first (3 classes), each with a head of its own on the mean of the last hidden states. Of each task
an adapter is trained, sparse (LT-SFT) or a LoRA, and one of both tasks together for as many steps. Then the two are put
on the backbone at once, each task read by the head that was trained with its own adapter. A cell is a seed; its small
JSON file has the answers on the test notices and is not made again. What was expected is in the output folder's
`plan.md`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from pairs import quiet
from torch import Tensor, nn

import lightning_peft
from lightning_peft.callbacks import LTSFT, LoRA
from lightning_peft.data import read_rows
from lightning_peft.files.records import write_record

TASKS = {"kind": "label", "order": "order"}
METHODS = {
    "sparse": lambda steps: LTSFT(density=0.05, full_steps=steps // 2, backbone="backbone"),
    "lora": lambda steps: LoRA(r=8, alpha=16, backbone="backbone"),
}
RATES = {"sparse": 1e-4, "lora": 1e-3, "none": 1e-2}
HEAD_RATE = 1e-2
STEPS, BATCH = 100, 8  # of one task; both together take twice as many
DRAWS = 10_000


class TwoTasks(L.LightningModule):
    """An encoder with one linear head for each task; a batch is of one task."""

    def __init__(self, model: str, classes: Mapping[str, int], learning_rate: float) -> None:
        super().__init__()
        from transformers import AutoModel

        self.backbone = AutoModel.from_pretrained(model)
        self.backbone.requires_grad_(False)
        width = self.backbone.config.hidden_size
        self.heads = nn.ModuleDict({task: nn.Linear(width, count) for task, count in classes.items()})
        self.learning_rate = learning_rate

    def logits(self, task: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the logits `[B, classes]` of a task."""
        states = self.backbone(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        return self.heads[task]((states * mask).sum(1) / mask.sum(1))

    def training_step(self, batch: tuple[str, Mapping[str, Tensor], Tensor], batch_idx: int) -> Tensor:
        task, inputs, labels = batch
        return nn.functional.cross_entropy(self.logits(task, inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        adapted = [p for p in self.backbone.parameters() if p.requires_grad]
        groups = [{"params": self.heads.parameters(), "lr": HEAD_RATE}]
        return torch.optim.AdamW(groups + ([{"params": adapted}] if adapted else []), lr=self.learning_rate)


class Notices:
    """The notices as batches of a task, the same for every method under one seed."""

    def __init__(self, model: str) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        rows = read_rows("package:notices")
        self.texts = {split: [r["text"] for r in rows if r["split"] == split] for split in ("train", "test")}
        self.classes = {task: sorted({row[column] for row in rows}) for task, column in TASKS.items()}
        self.labels = {
            (task, split): torch.tensor([self.classes[task].index(r[column]) for r in rows if r["split"] == split])
            for task, column in TASKS.items()
            for split in ("train", "test")
        }

    def batches(self, task: str, steps: int, seed: int) -> Iterator[tuple[str, Any, Tensor]]:
        """Yield so many training batches of a task, in an order drawn with the seed."""
        generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            if len(order) < BATCH:
                order = torch.randperm(len(self.texts["train"]), generator=generator)
            taken, order = order[:BATCH], order[BATCH:]
            yield task, self.encoded([self.texts["train"][i] for i in taken]), self.labels[task, "train"][taken]

    def encoded(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return texts as the model's inputs, `[B, T]` each."""
        return dict(self.tokenizer(list(texts), padding=True, return_tensors="pt"))

    @torch.no_grad()
    def right(self, module: TwoTasks, task: str) -> list[int]:
        """Return of each test notice whether the module tells its class right."""
        module.eval()
        texts, answers = self.texts["test"], []
        for begin in range(0, len(texts), 100):
            answers.append(module.logits(task, self.encoded(texts[begin : begin + 100])).argmax(-1))
        return (torch.cat(answers) == self.labels[task, "test"]).int().tolist()


def trained(
    model: str, notices: Notices, method: str, tasks: Sequence[str], steps: int, seed: int, folder: Path
) -> TwoTasks:
    """Train on some tasks in turns, save the adapter to `folder`, and return the module."""
    L.seed_everything(seed, verbose=False)
    module = TwoTasks(model, {task: len(names) for task, names in notices.classes.items()}, RATES[method])
    streams = [notices.batches(task, steps, seed) for task in tasks]
    batches = list(itertools.chain.from_iterable(zip(*streams, strict=True)))
    callbacks: list[L.Callback] = [METHODS[method](len(batches))] if method in METHODS else []
    trainer = L.Trainer(
        max_steps=len(batches),
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    if callbacks:
        lightning_peft.save_adapter(module, folder)
    return module


def cell(model: str, notices: Notices, seed: int, steps: int) -> dict[str, Any]:
    """Return whether each test notice is told right, by what was trained and by task."""
    begin, right, heads = time.perf_counter(), dict[str, dict[str, list[int]]](), dict[tuple[str, str], Any]()

    def test(name: str, module: TwoTasks, tasks: Sequence[str] = tuple(TASKS)) -> None:
        right[name] = {task: notices.right(module, task) for task in tasks}

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        test("frozen features", trained(model, notices, "none", list(TASKS), steps, seed, root))
        for method in METHODS:
            for task in TASKS:
                alone = trained(model, notices, method, [task], steps, seed, root / f"{method}-{task}")
                heads[method, task] = copy.deepcopy(alone.heads[task])
                test(f"{method}, alone on {task}", alone, [task])
            test(f"{method}, both together", trained(model, notices, method, list(TASKS), steps, seed, root / "both"))
        for first, second in itertools.product(METHODS, repeat=2):
            module = TwoTasks(model, {task: len(names) for task, names in notices.classes.items()}, 0.0)
            # weights' own deltas lie below what wraps their layers
            for method, task in sorted(((first, "kind"), (second, "order")), key=lambda part: part[0] != "sparse"):
                lightning_peft.load_adapter(module.backbone, root / f"{method}-{task}", name=f"{method}-{task}")
            for method, task in ((first, "kind"), (second, "order")):
                module.heads[task] = heads[method, task]
            test(f"sum: {first} for kind + {second} for order", module)
            # what the other task's adapter does to this one by itself
            for method, task, other in ((first, "kind", second), (second, "order", first)):
                if method == other:
                    lightning_peft.adapters(module.backbone).enable(False, f"{method}-{task}")
                    test(f"{method}, only the other's adapter on {task}", module, [task])
                    lightning_peft.adapters(module.backbone).enable(True, f"{method}-{task}")
    return {"seed": seed, "steps": steps, "right": right, "seconds": round(time.perf_counter() - begin, 1)}


def report(output: Path) -> dict[str, Any]:
    """Print and return accuracies, and differences paired by notice, means over seeds, with 95 % intervals."""
    cells = [json.loads(path.read_text()) for path in sorted((output / "cells").glob("*.json"))]
    if not cells:
        raise SystemExit(f"{output}/cells holds no finished cell: run `cells` first.")
    mean = {
        (name, task): np.mean([cell["right"][name][task] for cell in cells], axis=0)
        for name, tasks in cells[0]["right"].items()
        for task in tasks
    }
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(next(iter(mean.values()))), (DRAWS, len(next(iter(mean.values())))))

    def interval(values: Any) -> list[float]:
        return [round(float(x), 4) for x in np.quantile(values[drawn].mean(1), [0.025, 0.975])]

    rows, differences = [], []
    for (name, task), values in mean.items():
        seeds = [round(float(np.mean(cell["right"][name][task])), 4) for cell in cells]
        rows.append(
            {"what": name, "task": task, "accuracy": round(float(values.mean()), 4), "interval": interval(values)}
            | {"seeds": seeds}
        )
        print(f"{name:44} {task:6} {values.mean():.3f} [{rows[-1]['interval'][0]:.3f}, {rows[-1]['interval'][1]:.3f}]")
    for first, second in itertools.product(METHODS, repeat=2):
        name = f"sum: {first} for kind + {second} for order"
        for task, method in (("kind", first), ("order", second)):
            for other in (f"{method}, alone on {task}", f"{method}, both together", "frozen features"):
                change = mean[name, task] - mean[other, task]
                differences.append(
                    {"what": name, "task": task, "less": other, "difference": round(float(change.mean()), 4)}
                    | {"interval": interval(change)}
                )
                low, high = differences[-1]["interval"]
                print(f"{name} less {other}, {task}: {change.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
    results = {"cells": len(cells), "notices": len(drawn[0]), "rows": rows, "differences": differences}
    write_record(output / "results.json", results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("cells", "report"))
    parser.add_argument("--model", help="an encoder's folder or name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="of one task")
    parser.add_argument("--output", type=Path, default=Path("docs/results/composition"))
    options = parser.parse_args()
    if options.command == "report":
        report(options.output)
        return
    if options.model is None:
        parser.error("cells needs --model")
    quiet()
    notices = Notices(options.model)
    (options.output / "cells").mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        path = options.output / "cells" / f"seed{seed}.json"
        if path.exists():
            print(f"{path}: finished before")
            continue
        made = cell(options.model, notices, seed, options.steps)
        write_record(path, made)
        print(f"{path}: {made['seconds']:.0f} s")


if __name__ == "__main__":
    main()
