"""Bytes of a checkpoint and seconds to save it against Lightning's own with peft inside the module.

    python benchmarks/checkpoint_size.py [--model FOLDER] [--times 7] [--quick]

LoRA r=8 on q and v, after a step of AdamW, whose state is in both files. Both are written in turn by
`Trainer.save_checkpoint`. Prints both sizes, the medians of the seconds, and their ratios. About a minute on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from pairs import alternately, machine, milliseconds, quiet, ratio, verdict
from step_time import TARGETS, Module, adapted, load

from lightning_peft.callbacks import LoRA

BOUND = 50


def trained(module: Module, *callbacks: L.Callback) -> L.Trainer:
    ids = torch.arange(5, 13)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    plain: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=1, enable_model_summary=False, callbacks=list(callbacks), **plain)
    trainer.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="save twice, to see that it runs")
    options = parser.parse_args()
    times = 2 if options.quick else options.times
    quiet()
    print(machine())

    ours = trained(Module(load(options.model)), LoRA(r=8, alpha=16, target_modules=TARGETS))
    theirs = trained(Module(adapted(options.model)))
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "ours.ckpt"), Path(folder, "theirs.ckpt")
        seconds = alternately(lambda: ours.save_checkpoint(files[0]), lambda: theirs.save_checkpoint(files[1]), times)
        sizes = [file.stat().st_size for file in files]
        states = [torch.load(file, weights_only=True)["optimizer_states"][0]["state"] for file in files]
    held = [sum(t.numel() for s in state.values() for t in s.values() if t.dim()) for state in states]
    print(f"\nours {sizes[0]:,} bytes, Lightning's own {sizes[1]:,} bytes: {sizes[1] / sizes[0]:.1f} times smaller")
    verdict(f"at least {BOUND} times smaller", sizes[1] >= BOUND * sizes[0])
    verdict(f"both hold the optimizer's state ({held[0]:,} numbers)", held[0] == held[1] > 0)
    print(f"saved in {milliseconds(seconds[0])}, Lightning's own in {milliseconds(seconds[1])}")
    print(f"seconds, Lightning's own / ours: {ratio(seconds[1], seconds[0])}")


if __name__ == "__main__":
    main()
