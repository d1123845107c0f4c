"""Adapters with something in them: what several tests put on a tiny model."""

from __future__ import annotations

import torch
from peft import LoraConfig
from tiny_models import tiny
from torch import Tensor, nn

from lightning_peft.editing import head_offsets_config, head_sites
from lightning_peft.stack.stack import AdapterStack, stack_of

HEADS = [(0, 1), (1, 0), (1, 3), (2, 3)]  # (layer, head)
PROJECTIONS = {
    "llama": "self_attn.o_proj",
    "wide_llama": "self_attn.o_proj",
    "gpt2": "attn.c_proj",
    "gpt_neox": "attention.dense",
    "opt": "self_attn.out_proj",
}


def fill(stack: AdapterStack, name: str, seed: int = 3, size: float = 1.0) -> None:
    """Give an adapter random values, so that it shows."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in stack.tensors(stack[name]).values():
        tensor.copy_(size * torch.randn(tensor.shape, generator=generator))


def add_offsets(model: nn.Module, positions: str = "all", alpha: float = 2.0, name: str = "edit") -> AdapterStack:
    """Random offsets on the heads of `HEADS`."""
    stack = stack_of(model)
    stack.add(head_offsets_config(head_sites(model), HEADS, alpha, positions), name, computed=True)
    fill(stack, name)
    return stack


def add_lora(model: nn.Module, targets: list[str], name: str = "lora", **options: object) -> AdapterStack:
    """A random LoRA adapter of rank 2."""
    stack = stack_of(model)
    stack.add(LoraConfig(r=2, lora_alpha=1, target_modules=targets, **options), name)
    fill(stack, name, seed=4)
    return stack


def edited(kind: str, positions: str = "all", alpha: float = 2.0) -> tuple[nn.Module, AdapterStack]:
    model = tiny(kind)
    return model, add_offsets(model, positions, alpha)


def both(kind: str, positions: str = "all") -> tuple[nn.Module, AdapterStack]:
    """LoRA, then head offsets, on the same projections."""
    model = tiny(kind)
    add_lora(model, [PROJECTIONS[kind]])
    return model, add_offsets(model, positions)


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor, **given: object) -> Tensor:
    return model(input_ids=tokens, **given).logits


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two tensors agree to `tolerance` of the largest value, as the laws measure it."""
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())
