"""Two LightningModules as somebody might write them, their data, and a Trainer: what tests of tuning share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tiny_models import VOCABULARY, tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[1]
QUIET = (  # what Lightning says of any small run
    "ignore:You defined a `validation_step`",
    "ignore:.*does not have many workers",
    "ignore:.*is deprecated",
    r"ignore:\s*(``|skip_none|By default only one Jsonargparse)",
    "ignore:.*loftq_config",
    "ignore:.*deprecated in",
    "ignore:LightningCLI's args",
    "ignore:.*Be aware that when using `ckpt_path`",
    "ignore:.*removed from hparams",
    "ignore:.*will be overridden by `LightningCLI",
    "ignore:fan_in_fan_out",
    "ignore:.*Checkpoint directory",
)
BUILT = ("__init__", "setup", "configure_model")  # where a module may build its backbone


class Block(nn.Module):
    """Linear, BatchNorm, Dropout: `[B, 8] -> [B, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.relu(self.norm(self.linear(x))))


class Net(nn.Module):
    """A hand-written network: a convolution and three blocks, `[B, 1, 10] -> [B, 8]`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv1d(1, 2, 3)
        self.input = nn.Linear(16, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(self.conv(x).flatten(1))
        for block in self.blocks:
            x = block(x)
        return x


class Classifier(L.LightningModule):
    """A hand-written network with a head of three classes.

    Args:
        built: the hook in which the network is made; the head always is in `__init__`.
        seed: of the network.
        again: make the network anew each time that hook is called.
    """

    def __init__(self, built: str = "__init__", seed: int = 0, again: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.built, self.seed, self.again = built, seed, again
        torch.manual_seed(9)
        self.head = nn.Linear(8, 3)
        self.net: nn.Module | None = None
        self._build("__init__")

    def _build(self, hook: str) -> None:
        if hook == self.built and (self.net is None or self.again):
            self.net = Net(self.seed)

    def forward(self, x: Tensor) -> Tensor:
        assert self.net is not None
        return self.head(self.net(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


class SetupClassifier(Classifier):
    """Builds its network in `setup`."""

    def setup(self, stage: str) -> None:
        self._build("setup")


class ConfiguredClassifier(Classifier):
    """Builds its network in `configure_model`."""

    def configure_model(self) -> None:
        self._build("configure_model")


def classifier(built: str = "__init__", **options: Any) -> Classifier:
    """A classifier that builds its network in that hook, and overrides no other."""
    classes = {"__init__": Classifier, "setup": SetupClassifier, "configure_model": ConfiguredClassifier}
    return classes[built](built, **options)


class Language(L.LightningModule):
    """A transformers language model trained on its own tokens."""

    def __init__(self, kind: str = "llama") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = tiny(kind)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)


def points(rows: int = 16, batch_size: int = 4) -> DataLoader:
    """Inputs `[B, 1, 10]` and classes `[B]`, in order."""
    generator = torch.Generator().manual_seed(1)
    inputs, classes = torch.randn(rows, 1, 10, generator=generator), torch.arange(rows) % 3
    return DataLoader(TensorDataset(inputs, classes), batch_size)


def texts(rows: int = 8, batch_size: int = 4) -> DataLoader:
    """Token ids `[B, 9]`, in order."""
    ids = torch.randint(3, VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(ids), batch_size)


def data_of(module: L.LightningModule) -> DataLoader:
    return texts() if isinstance(module, Language) else points()


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A quiet Trainer on one CPU."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": 3,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **(quiet | options))


def fit(module: L.LightningModule, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """Train the module for three steps; `ckpt_path` goes to `fit`, other options to the Trainer."""
    ckpt_path = options.pop("ckpt_path", None)
    torch.manual_seed(5)
    made = trainer(*callbacks, **options)
    made.fit(module, data_of(module), ckpt_path=ckpt_path)
    return made


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's state."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def base_weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state without adapters, under the names it has without them."""
    state = {re.sub(r"\.base_layer(?=\.)", "", name): value for name, value in weights(module).items()}
    return {name: value for name, value in state.items() if not re.search(r"\.(lora|ia3|hada)_", name)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states have the same names and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names whose values changed."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def one_sentence(text: str) -> bool:
    """Whether an error message is one sentence: one line, one full stop, at its end."""
    return "\n" not in text and text.endswith(".") and len(re.findall(r"[.!?] +[A-Z]", text)) == 0


def python(code: str | Path, *arguments: Any, timeout: float = 240) -> str:
    """Run code, or a file of it, in a new process, with these tests' helpers at hand; what it prints."""
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # sums in another order are other sums
    }
    run = subprocess.run(
        [sys.executable, *(["-c", code] if isinstance(code, str) else [code]), *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout
