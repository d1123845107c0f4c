"""What test_strategies.py runs on two processes: `python two_processes.py STRATEGY FOLDER`, all in one launch.

Each scenario leaves what it found in FOLDER, one file for each process where the processes might differ.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import peft
import test_whole_fit
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from tuning import Classifier, Net, points, trainer

from lightning_peft import adapters, save_adapter
from lightning_peft.callbacks import IST, PEFT, AdapterEMA, LoRA

SEED = 5
ROWS = 16
GLOBAL_BATCH = 8
EPOCHS = 2
WHOLE = test_whole_fit.Run("three callbacks", True, True, accumulate=2, batches=3, epochs=2, schedule=True, clip=0.1)


def lora(r: int = 2) -> LoRA:
    return LoRA(r=r, backbone="net")


def stacked() -> list[L.Callback]:
    """Two adapters on the same layers, the outer around the inner: names in the module are not those saved."""
    outer = peft.IA3Config(target_modules=["linear"], feedforward_modules=["linear"])
    return [lora(), PEFT(outer, backbone="net", name="ia3")]


def shard(module: L.LightningModule) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = module.device_mesh["data_parallel"]
    for block in module.net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


class Sharded(Classifier):
    """Builds its network in `__init__` and shards it in `configure_model`."""

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self)


class BuiltAndSharded(Classifier):
    """Builds and shards its network in one hook, with an adapter put on it in between, or not."""

    def __init__(self, adapted: bool) -> None:
        super().__init__("configure_model")
        self.adapted = adapted

    def configure_model(self) -> None:
        self.net = Net(self.seed)
        if self.adapted:
            lora().apply(self)
        shard(self)


class Start(L.Callback):
    """The adapters as training begins, whole."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stack = adapters(pl_module)
        self.found = {f"{p.name}/{key}": v.clone() for p in stack.parts for key, v in stack.tensors(p).items()}


class Runs:
    """Fits with one strategy, and the folder for what they leave."""

    def __init__(self, folder: Path, devices: int, strategy: Callable[[], Any]) -> None:
        self.folder, self.devices, self.strategy = folder, devices, strategy

    def trainer(self, *callbacks: L.Callback, **options: Any) -> L.Trainer:
        more = {"max_epochs": EPOCHS, "max_steps": -1, "use_distributed_sampler": False} | options
        return trainer(*callbacks, strategy=self.strategy(), devices=self.devices, **more)

    def data(self) -> DataLoader:
        """The same batches, dealt out to the processes; Lightning's own sampler would shuffle."""
        dataset = points(ROWS).dataset
        sampler = DistributedSampler(dataset, self.devices, rank() if self.devices > 1 else 0, shuffle=False)
        return DataLoader(dataset, GLOBAL_BATCH // self.devices, sampler=sampler)

    def fit(self, name: str, module: L.LightningModule, *callbacks: L.Callback, **options: Any) -> L.Trainer:
        """Train from the seed, leaving a checkpoint after the first epoch and one at the end."""
        ckpt_path = options.pop("ckpt_path", None)
        L.seed_everything(SEED, verbose=False)
        saved = ModelCheckpoint(self.folder, filename=f"{name}-{{epoch}}", save_top_k=-1, every_n_epochs=1)
        made = self.trainer(*callbacks, saved, enable_checkpointing=True, **options)
        made.fit(module, self.data(), ckpt_path=ckpt_path)
        return made

    def through_and_on(
        self, name: str, module: Callable[[], L.LightningModule], callbacks: Callable[[], list[Any]]
    ) -> None:
        """Train through; then resume from the first epoch's checkpoint, in a module made anew."""
        self.fit(f"{name}-through", module(), *callbacks())
        self.fit(f"{name}-on", module(), *callbacks(), ckpt_path=self.folder / f"{name}-through-epoch=0.ckpt")

    def note(self, name: str, found: Any) -> None:
        torch.save(found, self.folder / f"{name}.{rank()}")


def rank() -> int:
    """This process's number; the first one starts the other, which is told."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def error(runs: Runs, name: str) -> Iterator[None]:
    """Note an error's type and words."""
    try:
        yield
    except Exception as caught:
        runs.note(name, (type(caught).__name__, str(caught)))
    else:
        runs.note(name, ("no error", ""))


def unseeded(runs: Runs, name: str, module: L.LightningModule, applied: bool) -> None:
    """Every process draws an adapter of its own, before or within fit."""
    torch.manual_seed(100 + rank())
    start, callback = Start(), lora()
    if applied:
        callback.apply(module)
    runs.trainer(callback, start, max_epochs=1).fit(module, runs.data())
    runs.note(name, start.found)


class Draws(L.Callback):
    """The blocks that IST draws for each step."""

    def __init__(self, ist: IST) -> None:
        self.ist = ist
        self.drawn: list[list[int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.drawn.append(self.ist.drawn)


def sparse(runs: Runs) -> None:
    """Draw blocks in both processes, each of which would begin with another seed."""
    ist = IST(lora(), share=0.4, score_every_n_steps=1, seed=rank())
    module, draws = Classifier(), Draws(ist)
    runs.trainer(ist, draws, max_epochs=4).fit(module, runs.data())
    trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    runs.note("ist", {"drawn": draws.drawn, "importance": ist.importance, "trained": trained})


def ddp(runs: Runs) -> None:
    unseeded(runs, "unseeded", Classifier(), applied=False)  # first: nothing has set a seed for all processes yet
    unseeded(runs, "unseeded-applied", Classifier(), applied=True)
    runs.through_and_on("ddp", Classifier, lambda: [lora(), AdapterEMA(0.7)])
    runs.through_and_on("stack", Classifier, stacked)
    sparse(runs)
    options = {"strategy": runs.strategy(), "devices": runs.devices, "use_distributed_sampler": False}
    test_whole_fit.fit(WHOLE, runs.folder / "whole", **options)
    for step in range(1, WHOLE.steps):
        options["strategy"] = runs.strategy()
        test_whole_fit.fit(WHOLE, runs.folder / f"from {step}", runs.folder / "whole" / f"step={step}.ckpt", **options)


def fsdp2(runs: Runs) -> None:
    unseeded(runs, "unseeded", Sharded(), applied=False)
    unseeded(runs, "unseeded-applied", Sharded(), applied=True)
    for kind, distributed in (("full", False), ("sharded", True)):
        runs.strategy = lambda distributed=distributed: model_parallel(distributed)
        runs.through_and_on(kind, Sharded, lambda: [lora(), AdapterEMA(0.7)])
        runs.through_and_on(f"{kind}-stack", Sharded, stacked)
        losses = []
        for ckpt_path in (runs.folder / f"{kind}-through-epoch=1.ckpt", None):
            made = runs.trainer(lora())
            losses.append(made.test(Sharded(), runs.data(), ckpt_path=ckpt_path, verbose=False)[0]["test_loss"])
        runs.note(f"{kind}-losses", losses)
        path = runs.folder / f"{kind}-through-epoch=0.ckpt"
        wrong: dict[str, tuple[L.LightningModule, list[Any]]] = {
            "another base": (Sharded(seed=1), [lora()]),
            "other settings": (Sharded(), [lora(3)]),
            "another adapter": (Sharded(), stacked()),
        }
        for name, (module, callbacks) in wrong.items():
            with error(runs, f"{kind}-{name}"):
                runs.trainer(*callbacks).fit(module, runs.data(), ckpt_path=path)
        with error(runs, f"{kind}-stack for one"):
            runs.trainer(lora()).test(
                Sharded(), runs.data(), ckpt_path=runs.folder / f"{kind}-stack-through-epoch=0.ckpt", verbose=False
            )
    with error(runs, "nan"):
        damaged = torch.load(runs.folder / "full-through-epoch=0.ckpt", weights_only=True)
        next(v for k, v in damaged["state_dict"].items() if "lora_A" in k).fill_(float("nan"))
        path = runs.folder / f"nan-{rank()}.ckpt"
        torch.save(damaged, path)
        runs.strategy = lambda: model_parallel(False)
        torch.distributed.barrier()
        runs.trainer(lora()).fit(Sharded(), runs.data(), ckpt_path=runs.folder / "nan-0.ckpt")
    runs.fit("applied", BuiltAndSharded(adapted=True), lora())
    with error(runs, "too late"):
        runs.fit("late", BuiltAndSharded(adapted=False), lora())
    module = Sharded()
    runs.fit("folder", module, lora())
    save_adapter(module, runs.folder / f"adapter-{rank()}")


def model_parallel(distributed: bool) -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=distributed)


def one_process(folder: Path) -> Runs:
    """The same on one process, for comparison."""
    return Runs(folder, 1, lambda: "auto")


def state(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenarios = {"ddp": (ddp, lambda: DDPStrategy()), "fsdp2": (fsdp2, lambda: model_parallel(False))}
    scenario, strategy = scenarios[sys.argv[1]]
    scenario(Runs(Path(sys.argv[2]), 2, strategy))
