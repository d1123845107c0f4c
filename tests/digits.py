"""A user's own task, in little more than its own lines: digits, on a small network that has learnt the others."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.tasks import Measure, Split, Task

Batch = list[Tensor]


class Digits(L.LightningModule):
    """A classifier of five digits: a backbone, a head, a learning rate; it returns its units and their scores."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head, self.learning_rate = backbone, nn.Linear(64, 5), 3e-3

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1] % 5)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        logits, target = self(batch[0]), batch[1] % 5
        prediction = logits.argmax(-1)
        nll = nn.functional.cross_entropy(logits, target, reduction="none")
        right = (prediction == target).float()
        return {"unit": batch[2], "accuracy": right, "nll": nll, "target": target, "prediction": prediction}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
    )


@functools.cache
def images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, digits, and the numbers of those below 5 and of 300 of the others."""
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x, y, order[y[order] < 5], order[y[order] >= 5][:300]


def loader(rows: Tensor, batch_size: int = 32, shuffle: bool = False) -> DataLoader[Any]:
    x, y, _, _ = images()
    return DataLoader(TensorDataset(x[rows], y[rows], rows), batch_size, shuffle=shuffle)


@functools.cache
def pretrained() -> nn.Module:
    """A network that has learnt the digits below 5."""
    L.seed_everything(0, verbose=False)
    module = Digits(network())
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=6, accelerator="cpu", enable_model_summary=False, **options)
    trainer.fit(module, loader(images()[2], shuffle=True))
    return module.backbone


class Data(L.LightningDataModule):
    """A fold of the 300 digits to test on; of the rest 100 to train on, and 50 to validate."""

    def __init__(self, split: Split, batch_size: int) -> None:
        super().__init__()
        new = images()[3]
        rest = new[1 - split.fold :: 2]
        self.test, self.train, self.val, self.batch_size = new[split.fold :: 2], rest[:100], rest[100:], batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(self.val)

    def test_dataloader(self) -> DataLoader[Any]:
        return loader(self.test)


class DigitTask(Task):
    """Digits 5 to 9, told apart by a network that knows 0 to 4."""

    measures: ClassVar[Mapping[str, Measure]] = {
        "accuracy": Measure("Accuracy", "share of digits told right", range=(0, 1)),
        "nll": Measure("NLL", "nats an image", -1, range=(0, None)),
    }
    unit = "image"

    def module(self) -> Digits:
        backbone = copy.deepcopy(pretrained())
        torch.manual_seed(1)
        module = Digits(backbone)
        module.backbone.requires_grad_(False)
        return module

    def data(self, split: Split, *, batch_size: int = 32) -> Data:
        return Data(split, batch_size)


class FunctionTask(DigitTask):
    """The same, with measures that are functions of all predictions."""

    measures: ClassVar[Mapping[str, Measure]] = {
        **DigitTask.measures,
        "f1": Measure(
            "macro-F1",
            "mean over digits of F1",
            columns=("target", "prediction"),
            function=functools.partial(f1_score, average="macro", zero_division=0),
        ),
        "mcc": Measure("MCC", "Matthews' correlation", columns=("target", "prediction"), function=matthews_corrcoef),
    }


class Head(L.Callback):
    """The head alone: the backbone is frozen as it is."""
