"""The time to put a saved adapter on a model that is already there, against `PeftModel.from_pretrained`.

    python benchmarks/load_adapter.py [--model FOLDER] [--pairs 40] [--quick]

LoRA r=8 on q and v, and on every linear layer. Both sides load the same folder of ours, in turn, in one process, each
on its own copy of the model; ours sees, too, that the base is the right one. Who comes first changes each time, and
taking the adapter off again is not timed. Prints the median of the ratios, pair by pair, with its 95% interval, whether
the upper bound is at most 1.2, and whether both compute the same bit for bit. About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pairs import machine, milliseconds, quiet, ratio, verdict

from lightning_peft import load_adapter, save_adapter
from lightning_peft.stack.stack import stack_of

TARGETS = {"q and v": ["q_proj", "v_proj"], "every linear layer": "all-linear"}
BOUND = 1.2
IDS = torch.arange(20, 40)[None]


def saved(model: Any, targets: Any, folder: str) -> None:
    """Write a random LoRA adapter."""
    from peft import LoraConfig

    config = LoraConfig(r=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    stack_of(model).add(config)
    save_adapter(model, folder)


def seconds(put_on: Callable[[], Any], take_off: Callable[[Any], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    loaded = put_on()
    taken = time.perf_counter() - start
    take_off(loaded)
    return taken


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def measure(name: str, load: Callable[[], Any], folder: Path, pairs: int) -> bool:
    """Print the ratio for one adapter, and say whether it is within the bound and both compute the same."""
    from peft import PeftModel

    ours, theirs = load(), load()
    kept: list[torch.Tensor] = []

    def remove(parts: Any) -> None:
        kept[:1] = kept[:1] or [logits(ours)]
        stack_of(ours).remove(parts[0].name)

    def unload(model: Any) -> None:
        kept[1:2] = kept[1:2] or [logits(model)]
        model.unload()

    sides = [
        lambda: seconds(lambda: load_adapter(ours, folder), remove),
        lambda: seconds(lambda: PeftModel.from_pretrained(theirs, str(folder)), unload),
    ]
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs + 1):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            taken = sides[side]()
            if number:  # the first pair warms up
                times[side].append(taken)
    found = ratio(*times)
    print(f"{name}: {milliseconds(times[0])} against {milliseconds(times[1])}, ratio {found}", flush=True)
    same = torch.equal(*kept)
    verdict(f"loading takes at most {BOUND} times as long as PeftModel.from_pretrained ({name})", found.high <= BOUND)
    verdict(f"both compute the same, bit for bit ({name})", same)
    return found.high <= BOUND and same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="a folder with the model")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="few pairs, to see that it runs")
    options = parser.parse_args()
    quiet()
    from transformers import AutoModelForCausalLM

    print(machine())

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)

    held = []
    for name, targets in TARGETS.items():
        with tempfile.TemporaryDirectory() as folder:
            saved(load(), targets, folder)
            held.append(measure(name, load, Path(folder), 4 if options.quick else options.pairs))
    return 0 if all(held) else 1


if __name__ == "__main__":
    raise SystemExit(main())
