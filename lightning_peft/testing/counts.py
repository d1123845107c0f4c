"""What the closed formulas for numbers of parameters are made of, read off a bare backbone."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_peft.backbone.defaults import every_matrix
from lightning_peft.backbone.modules import is_linear, is_matrix
from lightning_peft.backbone.structure import Span, blocks, matrix_shape, width
from lightning_peft.backbone.targets import Layers, Within, choose_targets

Shape = tuple[int, int]


def matrices(backbone: nn.Module, layers: Layers | None = None, within: Within | None = None) -> list[Shape]:
    """Inputs and outputs of each matrix that LoRA adapts by default, or of those chosen."""
    targets = choose_targets(backbone, None, layers, within)
    ends = tuple(f".{target}" for target in targets)
    return [matrix_shape(m) for name, m in backbone.named_modules() if name in targets or name.endswith(ends)]


def adalora_matrices(backbone: nn.Module) -> list[Shape]:
    """Inputs and outputs of each matrix that AdaLoRA adapts by default."""
    from peft.utils import TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING as KNOWN

    model_type: Any = getattr(getattr(backbone, "config", None), "model_type", None)
    targets = KNOWN.get(model_type)
    if targets is None:
        return matrices(backbone)
    ends = tuple(f".{target}" for target in targets)
    return [matrix_shape(m) for name, m in backbone.named_modules() if name.endswith(ends)]


def every(backbone: nn.Module) -> list[Shape]:
    """Inputs and outputs of every linear layer but the output embedding."""
    named = dict(backbone.named_modules())
    return [matrix_shape(named[name]) for name in every_matrix(backbone)]


def linear(backbone: nn.Module) -> list[Shape]:
    """Inputs and outputs of every linear layer in the blocks."""
    named = dict(backbone.named_modules())
    found = [named[name] for block in blocks(backbone) for span in block.spans() for name in span.matrices]
    return [matrix_shape(module) for module in found if is_linear(module)]


def parts(backbone: nn.Module, attention: bool = False) -> list[Shape]:
    """Inputs of the first and outputs of the last matrix of each feed-forward part, with `attention` of those too.

    A mixture of experts, which has no such matrices, is as wide as the stream.
    """
    found = [block for block in blocks(backbone) if block.mlp or block.experts]
    stream = (width(backbone), width(backbone))
    ends = [_ends(backbone, block.mlp) if block.mlp and not block.experts else stream for block in found]
    return ends + (_attentions(backbone) if attention else [])


def last_mlp(backbone: nn.Module, r: int) -> int:
    """LoRA of rank r in the last block's feed-forward part, for each matrix and each expert; an encoder's as well."""
    count = 0
    for block in {block.stack: block for block in blocks(backbone)}.values():
        count += sum(r * (i + o) for i, o in map(matrix_shape, _modules(backbone, block.mlp)))
        count += sum(r * e * (i + o) for e, i, o in (backbone.get_parameter(name).shape for name in block.experts))
    return count


def attention_inputs(backbone: nn.Module) -> list[int]:
    """The width of the concatenated heads in each attention."""
    spans = [span for block in blocks(backbone) for span in block.attention]
    return [matrix_shape(backbone.get_submodule(span.last))[0] for span in spans]


def prefixes(backbone: Any) -> list[Shape]:
    """Width of the keys and of the attention's input, for each attention."""
    config = backbone.config
    heads = config.num_attention_heads
    share = (getattr(config, "num_key_value_heads", None) or heads) / heads
    inputs = [first for first, _ in _attentions(backbone)]
    return [(int(share * width), i) for width, i in zip(attention_inputs(backbone), inputs, strict=True)]


def query_and_value(backbone: nn.Module) -> list[Shape]:
    """The matrices that give queries and values; where one gives all three, that one."""
    found = []
    for block in blocks(backbone):
        for span in block.attention:
            shapes = [matrix_shape(backbone.get_submodule(name)) for name in span.matrices[:-1]]
            # query, key and value stand in this order, but for OPT's key, value, query
            found += [shapes[0], shapes[-1]] if len(shapes) == 3 and shapes[0][1] >= shapes[2][1] else shapes[:1]
    return found


def biases(backbone: Any) -> int:
    """Every bias there is, and one for each output of a matrix without."""
    get_output = getattr(backbone, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    there = {id(p): p.numel() for name, p in backbone.named_parameters() if name.endswith("bias")}
    missing = [m for m in backbone.modules() if is_matrix(m) and m is not output and getattr(m, "bias", None) is None]
    return sum(there.values()) + sum(matrix_shape(m)[1] for m in missing)


def strata(backbone: nn.Module, r: int) -> int:
    """Biases in block 1; from block 2 on LoRA on the attention and biases of what it does not adapt."""
    count = 0
    for block in blocks(backbone):
        count += biases(block.module) if block.number else 0
        adapted = [name for span in block.attention for name in span.matrices] if block.number > 1 else []
        for inputs, outputs in (matrix_shape(backbone.get_submodule(name)) for name in adapted):
            count += r * (inputs + outputs) - outputs
    return count


def last_blocks(backbone: nn.Module) -> int:
    """Every parameter of the last block; of an encoder and a decoder both."""
    last = {block.stack: block.module for block in blocks(backbone)}
    return sum(parameter.numel() for module in last.values() for parameter in module.parameters())


def ia3(backbone: nn.Module) -> int:
    """The outputs of each matrix that IA3 adapts, but the inputs of feed-forward ones."""
    from lightning_peft.callbacks import IA3

    config: Any = IA3().make_config(backbone)
    shapes = {name: matrix_shape(backbone.get_submodule(name)) for name in config.target_modules}
    return sum(shape[name not in config.feedforward_modules] for name, shape in shapes.items())


def everything(backbone: nn.Module) -> int:
    """Every parameter, shared ones once."""
    return sum(parameter.numel() for parameter in backbone.parameters())


def _modules(backbone: nn.Module, span: Span | None) -> list[nn.Module]:
    return [backbone.get_submodule(name) for name in (span.matrices if span else ())]


def _ends(backbone: nn.Module, span: Span) -> Shape:
    return matrix_shape(backbone.get_submodule(span.first))[0], matrix_shape(backbone.get_submodule(span.last))[1]


def _attentions(backbone: nn.Module) -> list[Shape]:
    return [_ends(backbone, span) for block in blocks(backbone) for span in block.attention]
