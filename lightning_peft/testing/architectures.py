"""The architectures the laws are run on: tiny, random, on any machine, each as a LightningModule with its batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.testing.models import VOCABULARY, rough


@dataclass(frozen=True)
class Architecture:
    """A module to adapt.

    Args:
        name: e.g. `"gpt2"`.
        make_module: builds the LightningModule, always with the same weights.
        batches: what it is trained on and looked at with.
        has: what a method may need: `"transformers"`, `"attention"`, `"tokens"`, `"position_ids"` (it takes them),
            `"decoder"` (it generates), `"mlp"` (a matrix gives the output of its feed-forward parts), `"stream"` (its
            blocks are called, and give the residual stream), `"norms"`.
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
        if kind == "convolutional":  # a head of its own, outside the backbone
            torch.manual_seed(9)
            self.head = nn.Linear(8, 3)

    def forward(self, batch: Any) -> Tensor:
        """Return the logits: `[B, T, vocabulary]`, or `[B, classes]`."""
        if self.kind == "convolutional":
            return self.head(self.backbone(batch["pixel_values"]))
        if self.kind == "vit":
            return self.backbone(pixel_values=batch["pixel_values"]).logits
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "decoder_input_ids") if key in batch}
        if self.kind != "t5":
            inputs["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        output = self.backbone(**inputs)
        return output if isinstance(output, Tensor) else output.logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch)
        if logits.dim() == 2:
            return nn.functional.cross_entropy(logits, batch["labels"])
        targets = batch["decoder_input_ids"] if self.kind == "t5" else batch["input_ids"]
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)


def _batches(kind: str) -> tuple[dict[str, Tensor], ...]:
    generator = torch.Generator().manual_seed(7)
    batches = []
    for _ in range(2):
        if kind in ("vit", "convolutional"):
            size = {"vit": (3, 3, 8, 8), "convolutional": (3, 1, 6, 6)}[kind]
            batches.append({"pixel_values": torch.randn(size, generator=generator), "labels": torch.arange(3)})
            continue
        ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if kind == "t5":
            batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (3, 6), generator=generator)
        batches.append(batch)
    return tuple(batches)


_TEXT = frozenset({"transformers", "attention", "tokens", "mlp", "stream", "norms"})
_DECODER = _TEXT | {"position_ids", "decoder"}
_HAVE = {
    "gpt2": _DECODER,
    "llama": _DECODER,
    "wide_llama": _DECODER,
    "gpt_neox": _DECODER,
    "opt": _DECODER,
    "qwen3_moe": _DECODER - {"mlp"},
    "bert": _TEXT | {"position_ids"},
    "t5": _TEXT | {"decoder"},
    "vit": frozenset({"transformers", "attention", "mlp", "stream", "norms"}),
    "hand_written": frozenset({"tokens", "position_ids", "mlp"}),
    "convolutional": frozenset({"mlp", "stream", "norms"}),
}
ARCHITECTURES = {
    kind: Architecture(kind, functools.partial(TinyModule, kind), _batches(kind), has) for kind, has in _HAVE.items()
}
