"""The architectures the laws are run on: tiny, random, on any machine, each as a LightningModule with its batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.testing.models import VOCABULARY, tiny


@dataclass(frozen=True)
class Architecture:
    """A module to adapt.

    Args:
        name: e.g. `"gpt2"`.
        make_module: builds the LightningModule, always with the same weights.
        batches: what it is trained on and looked at with.
        has: what a method may need: `"transformers"`, `"attention"`, `"tokens"`, `"decoder"` (it generates).
    """

    name: str
    make_module: Callable[[], L.LightningModule]
    batches: tuple[Any, ...]
    has: frozenset[str]


class TinyModule(L.LightningModule):
    """A backbone and how it is trained: on its labels where it has logits for tokens, else on classes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.backbone = rough(kind)
        if kind == "cnn":  # a head of its own, outside the backbone
            torch.manual_seed(9)
            self.head = nn.Linear(8, 3)

    def forward(self, batch: Any) -> Tensor:
        """Logits: `[B, T, vocabulary]`, or `[B, classes]`."""
        if self.kind == "cnn":
            return self.head(self.backbone(batch["pixel_values"]))
        if self.kind == "vit":
            return self.backbone(pixel_values=batch["pixel_values"]).logits
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "decoder_input_ids") if key in batch}
        if self.kind != "t5":
            inputs["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return self.backbone(**inputs).logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch)
        if logits.dim() == 2:
            return nn.functional.cross_entropy(logits, batch["labels"])
        targets = batch["decoder_input_ids"] if self.kind == "t5" else batch["input_ids"]
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)


class ConvNet(nn.Module):
    """A hand-written network: a convolution, then blocks of a linear layer, BatchNorm and dropout, `[B, 8]`."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.dropout = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.dropout(torch.relu(self.norm(self.linear(x))))

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.input = nn.Conv2d(1, 2, 3), nn.Linear(32, 8)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.input(torch.relu(self.conv(pixel_values)).flatten(1))
        for block in self.blocks:
            x = block(x)
        return x


def rough(kind: str) -> nn.Module:
    """A tiny model with random biases and norms: in a freshly made one a lost bias would not show."""
    if kind == "cnn":
        torch.manual_seed(0)
        model: nn.Module = ConvNet().eval()
    else:
        model = tiny(kind)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def _batches(kind: str) -> tuple[dict[str, Tensor], ...]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(2):
        if kind in ("vit", "cnn"):
            size = {"vit": (3, 3, 8, 8), "cnn": (3, 1, 6, 6)}[kind]
            made.append({"pixel_values": torch.randn(size, generator=generator), "labels": torch.arange(3)})
            continue
        ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if kind == "t5":
            batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (3, 6), generator=generator)
        made.append(batch)
    return tuple(made)


_TEXT = frozenset({"transformers", "attention", "tokens"})
_HAVE = {
    "gpt2": _TEXT | {"decoder"},
    "llama": _TEXT | {"decoder"},
    "wide_llama": _TEXT | {"decoder"},
    "gpt_neox": _TEXT | {"decoder"},
    "opt": _TEXT | {"decoder"},
    "bert": _TEXT,
    "t5": _TEXT | {"decoder"},
    "vit": frozenset({"transformers", "attention"}),
    "cnn": frozenset[str](),
}
ARCHITECTURES = {
    kind: Architecture(kind, functools.partial(TinyModule, kind), _batches(kind), has) for kind, has in _HAVE.items()
}
