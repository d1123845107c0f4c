"""Layer offsets with something in them, on tiny models, and what those models are called with."""

from __future__ import annotations

from typing import Any

import torch
from edits import fill
from tiny_models import VOCABULARY
from torch import Tensor, nn

from lightning_peft.editing import layer_offsets_config, layer_sites
from lightning_peft.stack.stack import AdapterStack, stack_of
from lightning_peft.testing.models import rough

KINDS = ("llama", "gpt2", "gpt_neox", "opt", "bert", "t5", "vit")


def inputs(kind: str) -> dict[str, Tensor]:
    """What a model of this kind is called with, three rows."""
    generator = torch.Generator().manual_seed(7)
    if kind == "vit":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": ids} if kind == "t5" else {"input_ids": ids}


@torch.no_grad()
def logits_of(model: nn.Module, kind: str, **given: Any) -> Tensor:
    return model(**inputs(kind), **given).logits


def edited(kind: str, sites: str = "block", layers: slice = slice(None), **options: Any) -> tuple[Any, AdapterStack]:
    """A model with random layer offsets on some of its sites."""
    model: Any = rough(kind)
    add_layer_offsets(model, sites, layers, **options)
    return model, stack_of(model)


def add_layer_offsets(
    model: nn.Module, sites: str = "block", layers: slice = slice(None), name: str = "edit", **options: Any
) -> None:
    stack = stack_of(model)
    options = {"alpha": 2.0, "positions": "all"} | options
    stack.add(layer_offsets_config(layer_sites(model, sites)[layers], **options), name, computed=True)
    fill(stack, name)
