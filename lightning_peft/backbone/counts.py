"""Terms of the closed formulas for numbers of parameters, read off a bare backbone."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_peft.backbone.language_model import part_blocks
from lightning_peft.backbone.modules import is_linear, is_matrix
from lightning_peft.backbone.structure import Span, blocks, matrix_shape, width
from lightning_peft.backbone.targets import matching

Shape = tuple[int, int]


def shapes(
    backbone: nn.Module, modules: list[str] | str, parameters: list[str]
) -> tuple[list[Shape], list[tuple[int, int, int]]]:
    """Return inputs and outputs of each named matrix, and number, inputs and outputs of each fused mixture."""
    named = (backbone.get_submodule(name) for name in matching(backbone, modules)[1])
    experts = [p.shape for name, p in backbone.named_parameters() if any(name.endswith(end) for end in parameters)]
    return [matrix_shape(module) for module in named], [(e, i, o) for e, i, o in experts]


def linear(backbone: nn.Module) -> list[Shape]:
    """Return the inputs and outputs of every linear layer in the blocks."""
    named = dict(backbone.named_modules())
    matrices = [named[name] for block in blocks(backbone) for span in block.spans() for name in span.matrices]
    return [matrix_shape(module) for module in matrices if is_linear(module)]


def parts(backbone: nn.Module, attention: bool = False) -> list[Shape]:
    """Return inputs of the first and outputs of the last matrix of each feed-forward part; `attention`: of those too.

    A mixture of experts, which has no such matrices, is as wide as the stream.
    """
    with_mlp = [block for block in blocks(backbone) if block.mlp or block.experts]
    stream = (width(backbone), width(backbone))
    ends = [_ends(backbone, block.mlp) if block.mlp and not block.experts else stream for block in with_mlp]
    return ends + (_attentions(backbone) if attention else [])


def attention_inputs(backbone: nn.Module) -> list[int]:
    """Return the width of the concatenated heads in each attention."""
    spans = [span for block in blocks(backbone) for span in block.attention]
    return [matrix_shape(backbone.get_submodule(span.last))[0] for span in spans]


def prefixes(backbone: Any) -> list[Shape]:
    """Return the width of the keys and of the attention's input, for each attention."""
    config = backbone.config
    heads = config.num_attention_heads
    share = (getattr(config, "num_key_value_heads", None) or heads) / heads
    inputs = [first for first, _ in _attentions(backbone)]
    return [(int(share * width), i) for width, i in zip(attention_inputs(backbone), inputs, strict=True)]


def query_and_value(backbone: nn.Module) -> list[Shape]:
    """Return the shapes of the matrices that give queries and values; where one gives all three, of that one."""
    projections = []
    for block in blocks(backbone):
        for span in block.attention:
            shapes = [matrix_shape(backbone.get_submodule(name)) for name in span.matrices[:-1]]
            # query, key and value stand in this order, but for OPT's key, value, query
            projections += [shapes[0], shapes[-1]] if len(shapes) == 3 and shapes[0][1] >= shapes[2][1] else shapes[:1]
    return projections


def biases(backbone: Any) -> int:
    """Count every bias there is, and one for each output of a matrix without."""
    get_output = getattr(backbone, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    sizes = {id(p): p.numel() for name, p in backbone.named_parameters() if name.endswith("bias")}
    missing = [m for m in backbone.modules() if is_matrix(m) and m is not output and getattr(m, "bias", None) is None]
    return sum(sizes.values()) + sum(matrix_shape(m)[1] for m in missing)


def last_blocks(backbone: nn.Module) -> int:
    """Count every parameter of the last block; of an encoder and a decoder both."""
    last = {block.stack: block.module for block in part_blocks(backbone)}
    return sum(parameter.numel() for module in last.values() for parameter in module.parameters())


def everything(backbone: nn.Module) -> int:
    """Count every parameter, shared ones once."""
    return sum(parameter.numel() for parameter in backbone.parameters())


def _ends(backbone: nn.Module, span: Span) -> Shape:
    return matrix_shape(backbone.get_submodule(span.first))[0], matrix_shape(backbone.get_submodule(span.last))[1]


def _attentions(backbone: nn.Module) -> list[Shape]:
    return [_ends(backbone, span) for block in blocks(backbone) for span in block.attention]
