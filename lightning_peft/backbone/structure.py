"""The blocks of a backbone, their attention and their feed-forward part, found by structure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from lightning_peft.backbone.block_parts import (
    attends,
    convolves_tokens,
    feed_forward,
    is_fused,
    is_inside,
    linear_only,
    norm_size,
    outermost,
    output_last,
    stream_width,
)
from lightning_peft.backbone.modules import base_modules, is_matrix

__all__ = ["Block", "Span", "blocks", "is_fused", "matrix_shape", "width"]


@dataclass(frozen=True)
class Span:
    """The matrices of one attention or feed-forward part, in the order in which the block registers them.

    Args:
        matrices: full names; the first takes the part's input, the last gives its output, wherever it is registered.
    """

    matrices: tuple[str, ...]

    @property
    def first(self) -> str:
        return self.matrices[0]

    @property
    def last(self) -> str:
        return self.matrices[-1]


@dataclass(frozen=True)
class Block:
    """One of a backbone's repeated blocks.

    Args:
        name: the full name, e.g. `model.layers.3`.
        stack: the name of the list it stands in, e.g. `model.layers`.
        number: its place in that list, from 0.
        attention: one span for each attention in it: none, one, or two where there is cross-attention.
        mlp: the matrices of the feed-forward part, or None.
        experts: full names of the feed-forward part's parameters that hold one matrix for each of several experts,
            as transformers fuses them; what is beside them, such as a shared expert, is in `mlp`.
        module: the block itself.
        mixers: one span for each other part that mixes tokens, as a state-space layer in the place of an attention.
            Where the blocks of a list are nothing else, as Mamba's, these are their feed-forward parts.
        stream: the width of the residual stream.
    """

    name: str
    stack: str
    number: int
    attention: tuple[Span, ...]
    mlp: Span | None
    experts: tuple[str, ...]
    module: nn.Module
    mixers: tuple[Span, ...] = ()
    stream: int = 0

    def spans(self) -> tuple[Span, ...]:
        mixing = (*self.attention, *self.mixers)
        return mixing if self.mlp is None else (*mixing, self.mlp)

    @property
    def cross(self) -> tuple[Span, ...]:
        """Its attentions to another part's output: those behind the first that are not called as that is."""
        return tuple(span for span in self.attention[1:] if _unnumbered(span) != _unnumbered(self.attention[0]))


def blocks(backbone: nn.Module) -> list[Block]:
    """Return the backbone's repeated blocks, in order; an encoder's before its decoder's.

    They are the children of the outermost lists (`nn.ModuleList`, `nn.Sequential`) whose children hold matrices and
    are of one class, or, as in hybrids, of several that come again and again; names are those without adapters. Within
    a block a submodule whose class is called an attention is one, another that convolves over tokens is a mixer, and
    what remains is the feed-forward part.

    Args:
        backbone: any module, with or without adapters.

    Returns:
        The blocks; empty where nothing is repeated.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> blocks(model)[1].mlp.last
        'model.layers.1.mlp.down_proj'
    """
    named = dict(base_modules(backbone))
    stacks: list[str] = []
    for name, module in named.items():
        inside = any(name == stack or name.startswith(f"{stack}.") for stack in stacks)
        if isinstance(module, nn.ModuleList | nn.Sequential) and not inside and _is_stack(module):
            stacks.append(name)
    return [block for stack in stacks for block in _blocks_of(stack, named)]


def _is_stack(module: nn.Module) -> bool:
    children = list(module.children())
    # tuners may give a block a class of its own, under the same name
    classes = {type(child).__qualname__: child for child in children}
    if not children or any(is_matrix(child) for child in children):
        return False
    if not all(any(is_matrix(m) for m in child.modules()) for child in classes.values()):
        return False
    # of several classes may also be the stages of a network, which hold lists, or convolve
    return len(classes) == 1 or (len(children) > len(classes) and all(map(_is_layer, classes.values())))


def _is_layer(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.Sequential) and any(norm_size(m) for m in module.modules())


def _blocks_of(stack: str, named: dict[str, nn.Module]) -> list[Block]:
    children = list(named[stack].children())
    shapes = {n: matrix_shape(m) for n, m in named.items() if n.startswith(f"{stack}.") and is_matrix(m)}
    stream = stream_width(children, shapes.values())
    members = [_block(f"{stack}.{i}", stack, i, child, stream, shapes, named) for i, child in enumerate(children)]
    if any(block.attention or block.mlp or block.experts for block in members):
        return members
    return [replace(block, mlp=block.mixers[-1], mixers=block.mixers[:-1]) for block in members if block.mixers]


def _block(
    name: str,
    stack: str,
    number: int,
    module: nn.Module,
    stream: int,
    shapes: dict[str, tuple[int, int]],
    named: dict[str, nn.Module],
) -> Block:
    inside = {n: m for n, m in named.items() if n.startswith(f"{name}.")}
    matrices = [n for n in inside if n in shapes]
    attentions = outermost(inside, attends)
    mixers = outermost({n: m for n, m in inside.items() if not is_inside(n, attentions)}, convolves_tokens)
    mixers = [mixer for mixer in mixers if not any(is_inside(attention, [mixer]) for attention in attentions)]
    attending = [[n for n in matrices if is_inside(n, [part])] for part in attentions]
    mixing = [linear_only([n for n in matrices if is_inside(n, [part])], named) for part in mixers]
    rest = [n for n in matrices if not is_inside(n, [*attentions, *mixers])]
    experts = [
        f"{n}.{key}"
        for n, m in inside.items()
        if not is_inside(n, [*attentions, *mixers])
        for key, parameter in m.named_parameters(recurse=False)
        if is_fused(m, parameter)
    ]
    mlp = feed_forward(name, rest, stream, shapes, named)
    spans = [[Span(output_last(names, stream, shapes)) for names in parts if names] for parts in (attending, mixing)]
    return Block(
        name,
        stack,
        number,
        tuple(spans[0]),
        Span(mlp) if mlp else None,
        tuple(experts),
        module,
        tuple(spans[1]),
        stream,
    )


def _unnumbered(span: Span) -> str:
    return re.sub(r"\d+", "", span.last)


def width(backbone: nn.Module, members: Sequence[Block] | None = None) -> int:
    """Return the width of the backbone's residual stream: what most blocks' last matrices give.

    Args:
        backbone: any module.
        members: the blocks; default all.

    Raises:
        ValueError: the backbone has no blocks.
    """
    named = dict(base_modules(backbone))
    chosen = blocks(backbone) if members is None else members
    outputs = Counter(matrix_shape(named[span.last])[1] for block in chosen for span in block.spans())
    if not outputs:
        raise ValueError(f"{type(backbone).__name__} has no repeated blocks.")
    return outputs.most_common(1)[0][0]


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return `(inputs, outputs)` of a matrix product: features, or channels of a convolution."""
    from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features

    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    inputs, outputs = _get_in_out_features(base)
    if inputs is None or outputs is None:
        raise ValueError(f"{type(base).__name__} is not a matrix product.")
    return int(inputs), int(outputs)
