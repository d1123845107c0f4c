"""Find where a model's residual stream stands before and behind each feed-forward part, by watching one call."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.evaluating import evaluating
from lightning_peft.backbone.modules import base_modules, is_matrix
from lightning_peft.backbone.structure import Block, blocks, matrix_shape
from lightning_peft.stack.adapter_files.example_inputs import find_probe, outputs

_SHAPES = ((2, 3), (2,), (1, 2, 2))  # rows, and positions, of hidden states that blocks take


@dataclass(frozen=True)
class StreamSite:
    """The residual stream before and behind one feed-forward part.

    Args:
        before: the module whose input is the stream that the part is given: its norm, or without one before it the
            part's first matrix.
        block: the block, which gives the stream behind the part.
        norm: where the stream behind the part is what a norm gives (post-LN models), that norm.
    """

    before: str
    block: str
    norm: str | None


def stream_sites(backbone: nn.Module, targets: Collection[str]) -> dict[str, StreamSite]:
    """Return for the last matrix of each feed-forward part where the stream stands; nothing is changed.

    Neither names nor the order in which modules are registered tell: so the model is run once on a small input, and
    what its norms take and give is compared with what blocks and parts do. A model of transformers runs on an input
    made from its configuration; the blocks of any other are run by themselves.

    Args:
        backbone: any module with repeated blocks.
        targets: full names of last matrices.

    Raises:
        ValueError: a block cannot be run, or what it gives is not as wide as its feed-forward part's output.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> stream_sites(model, ["model.layers.0.mlp.down_proj"])["model.layers.0.mlp.down_proj"]
        StreamSite(before='model.layers.0.post_attention_layernorm', block='model.layers.0', norm=None)
    """
    chosen = [block for block in blocks(backbone) if block.mlp and block.mlp.last in targets]
    with _watched(backbone, chosen) as calls:
        _run(backbone, chosen, calls)
    return {block.mlp.last: _site(backbone, block, calls) for block in chosen if block.mlp}


@dataclass
class _Call:
    """What a module was given and gave, when it was first called."""

    given: Tensor
    gave: Tensor


Calls = dict[str, _Call]


@contextmanager
def _watched(backbone: nn.Module, chosen: Sequence[Block]) -> Iterator[Calls]:
    """Note the first calls of blocks, of their parts' first matrices, and of what could be a norm in them."""
    calls: Calls = {}
    named = dict(base_modules(backbone))
    names = {block.name for block in chosen} | {block.mlp.first for block in chosen if block.mlp}
    for block in chosen:
        inside = (name for name in named if name.startswith(f"{block.name}."))
        names |= {name for name in inside if not any(is_matrix(module) for module in named[name].modules())}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            if name not in calls and args and isinstance(args[0], Tensor) and isinstance(first, Tensor):
                calls[name] = _Call(args[0].detach().clone(), first.detach().clone())

        return hook

    handles = [(named[name], note(name)) for name in sorted(names)]
    held = [module.register_forward_hook(hook) for module, hook in handles]
    try:
        yield calls
    finally:
        for handle in held:
            handle.remove()


def _run(backbone: nn.Module, chosen: Sequence[Block], calls: Calls) -> None:
    """Call the model, or, where nothing is known of its input, its blocks."""
    models: list[str] = []
    for name, module in backbone.named_modules():
        inside = any(model == "" or name.startswith(f"{model}.") for model in models)
        if not inside and hasattr(module, "main_input_name") and hasattr(module, "config"):
            models.append(name)
            if (probe := find_probe(module)) is not None:
                calls.clear()  # of inputs that the model did not take
                outputs(module, probe)
    generator = torch.Generator().manual_seed(0)
    with evaluating(backbone), torch.enable_grad():
        for block in chosen:
            if block.name in calls or type(block.module).forward is nn.Module.forward:
                continue
            assert block.mlp is not None
            last = dict(base_modules(backbone))[block.mlp.last]
            for shape in _SHAPES:
                x = torch.randn(*shape, matrix_shape(last)[1], generator=generator)
                try:
                    # with a gradient, PyTorch's own layers take no fused path around their parts
                    block.module(x.to(_like(block.module)).requires_grad_())
                    break
                except Exception:  # whatever a block says of an input that is not for it
                    for name in [name for name in calls if name.startswith(f"{block.name}.")]:
                        del calls[name]


def _like(block: nn.Module) -> Tensor:
    """Return a parameter of a block, in the precision that it computes in."""
    return next((p for p in block.parameters() if p.is_floating_point()), torch.zeros(()))


def _site(backbone: nn.Module, block: Block, calls: Calls) -> StreamSite:
    assert block.mlp is not None
    first, last = block.mlp.first, block.mlp.last
    if block.name not in calls or first not in calls:
        unseen = block.name if block.name not in calls else first
        raise ValueError(f"{type(backbone).__name__} shows no residual stream: {unseen} could not be run by itself")
    width, gave = matrix_shape(dict(base_modules(backbone))[last])[1], calls[block.name].gave
    if gave.shape[-1] != width:
        raise ValueError(f"{block.name} gives {tuple(gave.shape)}, and its feed-forward part {width} features")
    inside = {name: call for name, call in calls.items() if name.startswith(f"{block.name}.") and name != first}
    norms = {name: call for name, call in inside.items() if not _same(call.given, call.gave)}
    behind = [name for name, call in norms.items() if _same(call.gave, gave)]
    if behind:
        return StreamSite(first, block.name, behind[-1])
    before = [name for name, call in norms.items() if _same(call.gave, calls[first].given)]
    return StreamSite(before[-1] if before else first, block.name, None)


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same numbers, in whatever shape of rows and positions."""
    return a.shape[-1] == b.shape[-1] and a.numel() == b.numel() and bool(torch.equal(a.flatten(), b.flatten()))
