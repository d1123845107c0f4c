"""The blocks of a backbone, their attention and their feed-forward part, found by structure."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn

from lightning_peft.backbone.modules import base_modules, is_matrix

# transformers, timm and most hand-written models call the class of their attention one of these, and of their experts
_ATTENTION = re.compile(r"Attention|Attn|MHA")
_EXPERTS = re.compile(r"Expert|MoE|Moe")


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
    """

    name: str
    stack: str
    number: int
    attention: tuple[Span, ...]
    mlp: Span | None
    experts: tuple[str, ...]
    module: nn.Module

    def spans(self) -> tuple[Span, ...]:
        return self.attention if self.mlp is None else (*self.attention, self.mlp)


def blocks(backbone: nn.Module) -> list[Block]:
    """Return the backbone's repeated blocks, in order; an encoder's before its decoder's.

    They are the children of the outermost lists (`nn.ModuleList`, `nn.Sequential`) whose children are all of one
    class and hold matrices; names are those without adapters. Within a block a submodule whose class is called an
    attention is one, and what remains is the feed-forward part.

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
    return [
        _block(f"{stack}.{number}", stack, number, child, named)
        for stack in stacks
        for number, child in enumerate(named[stack].children())
    ]


def _is_stack(module: nn.Module) -> bool:
    children = list(module.children())
    return (
        # tuners may give a block a class of its own, under the same name
        len({type(child).__qualname__ for child in children}) == 1
        and not any(is_matrix(child) for child in children)
        and any(is_matrix(m) for m in children[0].modules())
    )


def _block(name: str, stack: str, number: int, module: nn.Module, named: dict[str, nn.Module]) -> Block:
    inside = {n: m for n, m in named.items() if n.startswith(f"{name}.")}
    attentions: list[str] = []
    for n, m in inside.items():
        if _ATTENTION.search(type(m).__name__) and not any(n.startswith(f"{a}.") for a in attentions):
            attentions.append(n)
    matrices = [n for n, m in inside.items() if is_matrix(m)]
    stream = Counter(matrix_shape(named[n])[0] for n in matrices).most_common(1)[0][0] if matrices else 0
    inner = [tuple(n for n in matrices if n.startswith(f"{a}.")) for a in attentions]
    spans = tuple(Span(_output_last(names, stream, named)) for names in inner if names)
    rest = tuple(n for n in matrices if not any(n.startswith(f"{a}.") for a in attentions))
    experts = [
        f"{n}.{key}"
        for n, m in inside.items()
        if not any(f"{n}.".startswith(f"{a}.") for a in attentions)
        for key, parameter in m.named_parameters(recurse=False)
        if is_fused(m, parameter)
    ]
    return Block(name, stack, number, spans, Span(rest) if rest else None, tuple(experts), module)


def is_fused(owner: nn.Module, parameter: nn.Parameter) -> bool:
    """Return whether a parameter holds a matrix for each of several experts, `[experts, ., .]`."""
    return parameter.dim() == 3 and _EXPERTS.search(type(owner).__name__) is not None


def _output_last(names: tuple[str, ...], stream: int, named: dict[str, nn.Module]) -> tuple[str, ...]:
    """Move the matrix that gives the stream's width to the end: Phi-3 registers it before the fused input one."""
    output = next((n for n in reversed(names) if matrix_shape(named[n])[1] == stream), names[-1])
    return (*(n for n in names if n != output), output)


def width(backbone: nn.Module) -> int:
    """Return the width of the backbone's residual stream: what most blocks' last matrices give.

    Raises:
        ValueError: the backbone has no blocks.
    """
    named = dict(base_modules(backbone))
    outputs = Counter(matrix_shape(named[span.last])[1] for block in blocks(backbone) for span in block.spans())
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
