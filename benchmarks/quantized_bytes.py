"""Bytes of base weights in NF4 with double quantisation, and the peak memory of QLoRA against LoRA in float32.

    python benchmarks/quantized_bytes.py [--model FOLDER] [--times 5] [--r 8] [--tokens 128] [--quick]

Each side trains in processes of its own, in turn: LoRA with the same rank on every linear layer, two steps of AdamW on
one text. Prints the bytes of a quantised parameter, counted from the tensors that are kept (packed values, scales,
tables), which must be at most 0.56; and the highest resident memory between the beginning and the end of training,
as a ratio, with and without what the process holds after its imports. On both sides weights are in memory of the
process's own (not pages of the file), and what is freed is given back (else the C library keeps the holes that
unpacked weights leave, about 150 MiB). Linux only. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from pairs import machine, quiet, ratio, verdict
from step_time import Module, load

from lightning_peft.callbacks import LoRA, QLoRA

BOUND = 0.56
SIDES = ("qlora", "lora")
MEBI = 2**20


class Peak(L.Callback):
    """The highest resident memory of the process while it trains."""

    bytes = 0

    def on_train_start(self, *_: Any) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free is the system's again
        Path("/proc/self/clear_refs").write_text("5")  # the highest begins anew

    def on_train_end(self, *_: Any) -> None:
        self.bytes = resident("VmHWM")


def resident(line: str) -> int:
    """Bytes: `VmRSS` is now, `VmHWM` the highest."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(entry for entry in status if entry.startswith(line)).split()[1])


def train(side: str, model: str, r: int, tokens: int) -> dict[str, int]:
    """Train one side in this process; what it took."""
    from lightning_peft.backbone.defaults import every_matrix
    from lightning_peft.backbone.quantization import quantized_layers, weight_bytes

    quiet()
    import bitsandbytes  # noqa: F401 - on both sides, though only one needs it

    imported, module, peak = resident("VmRSS"), Module(load(model)), Peak()
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    alike: dict[str, Any] = {"r": r, "alpha": 16, "dropout": 0.0, "target_modules": every_matrix(module.backbone)}
    callback = QLoRA(**alike) if side == "qlora" else LoRA(**alike)
    ids = torch.arange(5, 5 + tokens)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    plain: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=2, enable_model_summary=False, callbacks=[callback, peak], **plain)
    trainer.fit(module, torch.utils.data.DataLoader([batch] * 2, batch_size=None))  # type: ignore[arg-type]
    layers = [layer for _, layer in quantized_layers(module.backbone)]
    return {
        "imported": imported,
        "peak": peak.bytes,
        "parameters": sum(layer.in_features * layer.out_features for layer in layers),
        "bytes": weight_bytes(module.backbone),
        "trained": sum(p.numel() for p in module.parameters() if p.requires_grad),
    }


def measured(side: str, options: argparse.Namespace) -> dict[str, int]:
    """Train one side in a new process."""
    arguments = ["--side", side, "--model", options.model, "--r", str(options.r), "--tokens", str(options.tokens)]
    command = [sys.executable, __file__, *arguments]
    # glibc: an allocation of 128 KiB or more is a mapping of its own, whatever was freed before
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="train each side once, to see that it runs")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(train(options.side, options.model, options.r, options.tokens)))
        return
    print(machine())
    runs: dict[str, list[dict[str, int]]] = {side: [] for side in SIDES}
    for number in range(1 if options.quick else options.times):
        for side in SIDES if number % 2 else reversed(SIDES):
            runs[side].append(measured(side, options))

    ours, theirs = runs["qlora"], runs["lora"]
    each = ours[0]["bytes"] / ours[0]["parameters"]
    print(f"\n{ours[0]['parameters']:,} quantised parameters in {ours[0]['bytes']:,} bytes: {each:.4f} bytes each")
    verdict(f"at most {BOUND} bytes for each quantised parameter", each <= BOUND)
    verdict(
        f"both train the same number of parameters ({ours[0]['trained']:,}) and only one is quantised",
        ours[0]["trained"] == theirs[0]["trained"] > 0 == theirs[0]["bytes"],
    )
    for name, without in (("the whole process", 0), ("beyond its imports", 1)):
        peaks = [[run["peak"] - without * run["imported"] for run in side] for side in (ours, theirs)]
        medians = [statistics.median(side) / MEBI for side in peaks]
        print(f"peak of {name}: QLoRA {medians[0]:,.0f} MiB, LoRA in float32 {medians[1]:,.0f} MiB")
        print(f"QLoRA / LoRA: {ratio([float(p) for p in peaks[0]], [float(p) for p in peaks[1]])}")


if __name__ == "__main__":
    main()
