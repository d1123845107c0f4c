"""The modules between a language model's blocks and its logits, found by watching it run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.language_model import part_blocks
from lightning_peft.backbone.modules import uncompiled

_TOLERANCE = 1e-3  # of the largest logit: the modules found must give what the model gives, to this
_TOKENS = 8  # of the trial


@dataclass(frozen=True)
class EarlyExit:
    """A causal language model's way out, which every layer's state can take.

    Args:
        model: the module that gives logits, wrappers left out.
        blocks: its blocks, in order.
        tail: what the last block's output goes through before the head: the final norm, a projection.
        head: the language-model head.
        tied: whether the head is the embedding's matrix.
    """

    model: nn.Module
    blocks: tuple[nn.Module, ...]
    tail: tuple[nn.Module, ...]
    head: nn.Module
    tied: bool

    def state(self, stream: Tensor) -> Tensor:
        """Return the head's input if a block's output `[..., width]` were the last one's."""
        for module in self.tail:
            stream = module(stream)
        return stream


@torch.no_grad()
def find_early_exit(backbone: nn.Module) -> EarlyExit:
    """Run a causal language model on a few tokens and see which modules its last block's output goes through.

    Args:
        backbone: of transformers, PEFT-wrapped, adapted, compiled or not.

    Raises:
        ValueError: it is no such model of one stack of blocks, or these modules alone do not make its logits.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> way_out = find_early_exit(model)
        >>> way_out.tail == (model.model.norm,), way_out.head is model.lm_head
        (True, True)
    """
    outer: Any = uncompiled(backbone)
    model: Any = uncompiled(getattr(outer, "get_base_model", lambda: outer)())  # looks into a PeftModel
    all_blocks = part_blocks(model)
    if len({block.stack for block in all_blocks}) != 1 or not hasattr(model, "get_input_embeddings"):
        raise ValueError(
            f"{type(model).__name__} is no causal language model of transformers with one stack of blocks, so its "
            "layers have no common way to logits."
        )
    modules = [block.module for block in all_blocks]
    embedding = model.get_input_embeddings()
    last: Tensor | None = None
    called: list[nn.Module] = []

    def reach(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal last
        last = first_tensor(output)
        called.clear()

    def follow(module: nn.Module, args: Any, output: Any) -> None:
        called.append(module)

    handles = [modules[-1].register_forward_hook(reach)]
    handles += [module.register_forward_hook(follow) for module in _beside(model, modules)]
    try:
        with torch.compiler.set_stance("force_eager"):
            # tokens from all of the vocabulary: some, such as padding, have embeddings of zeros, and so no logits
            tokens = torch.linspace(0, embedding.weight.shape[0] - 1, _TOKENS).long()
            output = model(input_ids=tokens[None].to(embedding.weight.device))
    finally:
        for handle in handles:
            handle.remove()
    refused = (
        f"{type(model).__name__} makes its logits from its last block by more than a chain of modules (a cap or a "
        "scale of logits, say), so the states of its earlier layers cannot be read as logits."
    )
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or last is None or not called:
        raise ValueError(refused)
    head = called[-1]
    tied = getattr(head, "weight", None) is embedding.weight
    way_out = EarlyExit(model, tuple(modules), tuple(called[:-1]), head, tied)
    try:
        difference = (head(way_out.state(last)) - logits).abs().max()
    except (RuntimeError, TypeError) as error:
        raise ValueError(refused) from error
    if not difference <= _TOLERANCE * logits.abs().max():
        raise ValueError(refused)
    return way_out


def first_tensor(output: Any) -> Tensor:
    """Return a block's output, which may stand first in a tuple."""
    return output[0] if isinstance(output, tuple | list) else output


def _beside(model: nn.Module, modules: list[nn.Module]) -> list[nn.Module]:
    """Return the outermost modules that neither hold blocks nor are in one."""
    inside = {inner for module in modules for inner in module.modules()}
    above = [m for m in model.modules() if m not in inside and modules[0] in set(m.modules())]
    return [child for m in above for child in m.children() if child not in above and child not in inside]
