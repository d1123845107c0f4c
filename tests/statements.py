"""Labelled statements and a small module to edit with them, also for scripts that run in other processes."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from tiny_models import tiny
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

QUESTIONS, WIDTH = 9, 8


class Statements(Dataset):
    """Three statements a question, of different lengths; true ones end in token 5 or 6, others in 7 or 8."""

    def __init__(self, drop: tuple[str, ...] = (), truth: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows: list[dict[str, Any]] = []
        for i in range(3 * QUESTIONS):
            length, true = 4 + i % 5, i % 2 if truth is None else truth
            ids = torch.zeros(WIDTH, dtype=torch.long)
            ids[:length] = torch.randint(9, 64, (length,), generator=generator)
            ids[length - 1] = (5 if true else 7) + i // 2 % 2
            mask = (torch.arange(WIDTH) < length).long()
            labels = ids.masked_fill((mask == 0) | (torch.arange(WIDTH) < 2), -100)
            row = {"input_ids": ids, "attention_mask": mask, "labels": labels, "label": true, "group": i // 3}
            self.rows.append({k: v for k, v in (row | {"prompt_end": 1}).items() if k not in drop})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def column(self, name: str) -> Tensor:
        return torch.stack([torch.as_tensor(row[name]) for row in self.rows])

    def loader(self, batch_size: int = 5, **options: Any) -> DataLoader:
        return DataLoader(self, batch_size=batch_size, **options)


class Module(L.LightningModule):
    """A causal language model with a counter of training steps and a metric that shows any change of the model."""

    def __init__(self, kind: str = "llama", learning_rate: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = tiny(kind)
        self.steps = 0
        self.seen: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        return self._loss(batch)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.seen += batch["input_ids"].sum(-1).tolist()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), batch_size=len(batch["input_ids"]))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch), batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.hparams["learning_rate"])

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.backbone(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return L.Trainer(callbacks=list(callbacks), **(quiet | options))
