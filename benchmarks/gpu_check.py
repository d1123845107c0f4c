"""Try on a GPU what the tests try on a CPU, on random weights of a 7B's shape, in at most eight minutes.

python benchmarks/gpu_check.py [--output check.json] [--only lora qlora] [--seconds 480]
python benchmarks/gpu_check.py --tiny                # the same on a small model, on a CPU too

LoRA in bfloat16; QLoRA on NF4 with a paged optimizer; ITI computed and generating on an NF4 base; a model spread by
`device_map`; `torch.compile`. Peak memory of training stands beside what `plan` says it would take. It prints a table
and a JSON, and exits with 1 where a part fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft import adapters
from lightning_peft.backbone.shapes import shapes_only
from lightning_peft.callbacks import ITI, LoRA, QLoRA, Quantize
from lightning_peft.planning.estimate import plan


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaMA and of what it is given."""

    width: int
    inner: int
    layers: int
    heads: int
    words: int
    rows: int
    length: int
    steps: int
    backend: str  # of torch.compile


SEVEN_B = Shape(4096, 11008, 32, 32, 32000, rows=4, length=512, steps=8, backend="inductor")
TINY = Shape(64, 128, 2, 4, 200, rows=2, length=16, steps=2, backend="eager")


class Language(L.LightningModule):
    """A causal language model of random weights in bfloat16."""

    def __init__(self, shape: Shape, layers: int | None = None) -> None:
        super().__init__()
        self.backbone = made(shape, layers)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        loss: Tensor = self.backbone(**inputs, labels=batch["input_ids"]).loss
        self.last_loss = loss.detach()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


class Meter(L.Callback):
    """Seconds of the steps after the first, and the peak memory of all."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.peak: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return (self.ends[-1] - self.ends[0]) / max(len(self.ends) - 1, 1)


def made(shape: Shape, layers: int | None = None) -> Any:
    """Return a LLaMA of random weights, on the GPU where there is one and no other device is set."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.words,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        dtype=torch.bfloat16,
    )
    planned = torch.get_default_device().type == "meta"
    with torch.device("meta" if planned else _device()):
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)


def rows(shape: Shape, count: int) -> list[dict[str, Tensor]]:
    """Return random texts in pairs, labelled, whose last token says the label."""
    draw = torch.Generator().manual_seed(0)
    texts = []
    for i in range(count):
        ids = torch.randint(10, shape.words, (shape.length,), generator=draw)
        ids[-1] = 5 if i % 2 else 7
        texts.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "label": i % 2, "group": i // 2})
    return [{name: torch.as_tensor(value) for name, value in text.items()} for text in texts]


def lora(shape: Shape) -> dict[str, Any]:
    """Train a LoRA on a base in bfloat16."""
    return _trained(shape, lambda: [LoRA(r=16)])


def qlora(shape: Shape) -> dict[str, Any]:
    """Train a LoRA on a base in NF4, with a paged optimizer."""
    return _trained(shape, lambda: [QLoRA(r=16, compute_dtype="bfloat16", paged_optimizer="paged_adamw_8bit")])


def iti_on_nf4(shape: Shape) -> dict[str, Any]:
    """Compute ITI on a base in NF4 and generate with it, with a cache and without."""
    module = Language(shape)
    edit = ITI(num_heads=min(48, shape.layers * shape.heads), alpha=15.0)
    began = time.perf_counter()
    _fit(module, [Quantize("nf4", compute_dtype="bfloat16"), edit], rows(shape, 32), shape, max_epochs=1)
    seconds = time.perf_counter() - began
    model = module.to(_device()).eval().backbone
    prompt = rows(shape, 1)[0]["input_ids"][None, : shape.length // 2].to(_device())
    stack = adapters(module)
    steered, logits = _written(model, prompt), _logits(model, prompt)
    plain = _written(model, prompt, use_cache=False)
    stack.enable(False)
    off, written = _logits(model, prompt), _written(model, prompt)
    stack.remove(stack.parts[0].name)
    bare = _logits(model, prompt)
    _check(torch.equal(off, bare), "switched off, the edit is not the base bit for bit")
    _check(bool(torch.isfinite(logits).all()) and not torch.equal(logits, bare), "the edit does nothing")
    return {
        "seconds": seconds,
        "heads": len(edit.edit_.heads),
        "tokens_as_without_cache": float((steered == plain).float().mean()),  # half precision rounds, and ties fall
        "tokens_moved": float((steered != written).float().mean()),
    }


def device_map(shape: Shape) -> dict[str, Any]:
    """Put a fresh LoRA on a model that transformers spread over devices, and go backward through it."""
    from transformers import LlamaForCausalLM

    layers = min(shape.layers, 4)
    with tempfile.TemporaryDirectory() as folder:
        small = made(shape, layers)
        one_layer = sum(p.nbytes for p in small.model.layers[0].parameters())
        around = sum(p.nbytes for p in small.parameters()) - layers * one_layer
        small.save_pretrained(folder)
        del small
        if torch.cuda.is_available():  # about half of the layers fit
            room: dict[int | str, Any] = {0: around + int(one_layer * (layers / 2 + 1)), "cpu": "64GiB"}
            model: Any = LlamaForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, device_map="auto", max_memory=room
            )
        else:
            model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"})
    model.eval()
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    ids = rows(shape, 1)[0]["input_ids"][None].to(_device())
    before = _logits(model, ids)
    holder = _Holder(model)
    LoRA(r=8, backbone="backbone").apply(holder)
    _check(torch.equal(_logits(model, ids), before), "a fresh LoRA is not an identity")
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    alive = all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)
    _check(bool(gradients) and alive, "some of the LoRA has no finite gradient")
    return {"devices": devices, "trained_tensors": len(gradients), "tokens": _written(model, ids[:, :8]).shape[1]}


def compiled(shape: Shape) -> dict[str, Any]:
    """Compile a model with a LoRA, and compare it with itself run eagerly."""
    model = made(shape, min(shape.layers, 4)).eval()
    LoRA(r=8, backbone="backbone").apply(_Holder(model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    ids = rows(shape, 1)[0]["input_ids"][None].to(_device())
    eager = _logits(model, ids)
    fast: Any = torch.compile(model, backend=shape.backend)
    began = time.perf_counter()
    logits = _logits(fast, ids)
    first = time.perf_counter() - began
    distance = float((logits - eager).abs().max() / eager.abs().max())
    _check(distance <= 0.05, f"compiled logits differ by {distance:.2g} of the largest")  # bfloat16 keeps eight bits
    times = {name: _seconds(lambda run=run: _logits(run, ids)) for name, run in (("eager", model), ("fast", fast))}
    return {"compile_seconds": first, "relative_difference": distance, "times_as_fast": times["eager"] / times["fast"]}


PARTS: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "lora": lora,
    "qlora": qlora,
    "iti_on_nf4": iti_on_nf4,
    "device_map": device_map,
    "compiled": compiled,
}


def check(shape: Shape, parts: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run the parts one after the other; none begins after the time is over, and one that fails stops no other."""
    ends = time.monotonic() + seconds
    results: dict[str, Any] = {}
    for name in parts:
        began = time.monotonic()
        if began > ends:
            results[name] = {"skipped": f"{seconds:g} seconds were over"}
            continue
        try:
            results[name] = PARTS[name](shape)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"}
        results[name]["whole_seconds"] = time.monotonic() - began
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def _trained(shape: Shape, callbacks: Callable[[], list[L.Callback]]) -> dict[str, Any]:
    with shapes_only():
        planned = plan(Language(shape), callbacks(), shape.rows, shape.length, "bf16-true")
    module, meter = Language(shape), Meter()
    _fit(module, [*callbacks(), meter], rows(shape, shape.rows), shape, max_steps=shape.steps)
    loss = float(module.last_loss)
    _check(loss == loss and loss < 1e4, f"the loss is {loss}")
    peak = meter.peak
    return {
        "seconds_a_step": meter.seconds,
        "tokens_a_second": shape.rows * shape.length / meter.seconds if meter.seconds else None,
        "loss": loss,
        "planned_bytes": planned.total_bytes,
        "peak_bytes": peak,  # of a GPU alone
        "planned_to_peak": None if peak is None else planned.total_bytes / peak,
    }


def _fit(module: L.LightningModule, callbacks: list[Any], data: list[Any], shape: Shape, **bounds: int) -> None:
    trainer = L.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        precision="bf16-true",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_epochs": -1} | bounds if "max_steps" in bounds else bounds),
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=shape.rows))


class _Holder(L.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    made: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    return made


def _written(model: Any, ids: Tensor, use_cache: bool = True) -> Tensor:
    mask, count = torch.ones_like(ids), 16 if ids.device.type == "cuda" else 4
    made: Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=use_cache
    )
    return made[:, ids.shape[1] :]


def _seconds(run: Callable[[], object], times: int = 5) -> float:
    run()
    began = time.perf_counter()
    for _ in range(times):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check(right: bool, what: str) -> None:
    if not right:
        raise RuntimeError(what)


def _print(results: dict[str, Any]) -> None:
    for name, values in results.items():
        print(name)
        for key, value in values.items():
            if key.endswith("_bytes") and value is not None:
                key, value = key.removesuffix("_bytes") + " GiB", value / 2**30
            print(f"    {key:26}{value:.4g}" if isinstance(value, float) else f"    {key:26}{value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model, which needs no GPU")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=480, help="no part begins later")
    parser.add_argument("--output", type=Path, help="a file for the JSON, beside printing it")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU: give --tiny")
    warnings.filterwarnings("ignore")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results = check(TINY if options.tiny else SEVEN_B, options.only, options.seconds)
    _print(results)
    text = json.dumps({"device": device, "torch": torch.__version__, "tiny": options.tiny, "parts": results})
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    sys.exit(any("error" in part for part in results.values()))


if __name__ == "__main__":
    main()
