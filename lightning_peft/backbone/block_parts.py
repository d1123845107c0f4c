"""The parts of a block, by its modules: what attends, what else mixes tokens, and the feed-forward part."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import nn

from lightning_peft.backbone.modules import is_linear, is_matrix

Shape = tuple[int, int]

# transformers, timm and most hand-written models call the class of their attention one of these, and of their experts
_ATTENTION = re.compile(r"Attention|Attn|MHA|MLA")
_EXPERTS = re.compile(r"Expert|MoE|Moe")
_LAYER = re.compile(r"(En|De)coderLayer$")  # named after its attention, with a feed-forward part beside it
# of what may be as wide as the output: its gate, a way in, a table of positions
_NO_OUTPUT = re.compile(r"(^|_)(g|gate|in|w?[qkv]|qkv|kv|query|key|value|queries|keys|values|embeddings?)(_|$)")


def is_fused(owner: nn.Module, parameter: nn.Parameter) -> bool:
    """Return whether a parameter holds a matrix for each of several experts, `[experts, ., .]`."""
    return parameter.dim() == 3 and _EXPERTS.search(type(owner).__name__) is not None


def attends(module: nn.Module) -> bool:
    """Return whether a module is an attention, by the name of its class."""
    name = type(module).__name__
    return _ATTENTION.search(name) is not None and _LAYER.search(name) is None


def convolves_tokens(module: nn.Module) -> bool:
    """Return whether a module mixes tokens by a convolution of each feature, as state-space layers do."""
    return any(isinstance(child, nn.Conv1d) and child.groups > 1 for child in module.children())


def outermost(modules: Mapping[str, nn.Module], is_one: Callable[[nn.Module], bool]) -> list[str]:
    """Return the names of the modules of a kind that are in no other of it."""
    names: list[str] = []
    for name, module in modules.items():
        if not is_inside(name, names) and is_one(module):
            names.append(name)
    return names


def is_inside(name: str, parts: Iterable[str]) -> bool:
    """Return whether a name is that of one of these modules, or of something in it."""
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def norm_size(module: nn.Module) -> int | None:
    """Return how many features a normalisation of each token takes; None of any other module."""
    if "norm" not in type(module).__name__.lower() or isinstance(module, nn.modules.batchnorm._NormBase):
        return None
    weight = module._parameters.get("weight")
    return weight.numel() if weight is not None and weight.dim() == 1 else None


def stream_width(members: Collection[nn.Module], shapes: Iterable[Shape]) -> int:
    """Return the width of the residual stream in a list of blocks.

    Args:
        members: the blocks. What they normalise themselves is the stream.
        shapes: inputs and outputs of their matrices; where no block normalises it, most matrices take it.
    """
    norms = Counter(size for block in members for child in block.children() if (size := norm_size(child)))
    inputs = Counter(inputs for inputs, _ in shapes)
    common = [size for size, _ in norms.most_common() if size in inputs] or [size for size, _ in inputs.most_common(1)]
    return common[0] if common else 0


def output_last(names: Iterable[str], stream: int, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """Move the matrix that gives a part's output to the end of its matrices, wherever it is registered.

    It gives the stream's width, is no gate and no way in, and in no part of the part: Phi-3 registers it before the
    fused input one, MiniMax before its gate, DeepSeek V3.2 before the indexer that chooses tokens, ProphetNet before a
    matrix of relative positions.
    """
    names = tuple(names)
    wide = [name for name in names if shapes[name][1] == stream]
    plain = [name for name in wide if not _NO_OUTPUT.search(name.rpartition(".")[2])] or wide or list(names)
    depth = min((name.count(".") for name in plain), default=0)
    output = [name for name in plain if name.count(".") == depth][-1]
    return (*(name for name in names if name != output), output)


def feed_forward(
    block: str, names: Iterable[str], stream: int, shapes: Mapping[str, Shape], named: Mapping[str, nn.Module]
) -> tuple[str, ...]:
    """Return the matrices of a block's feed-forward part, of all that neither attend nor mix tokens.

    Where a child of the block leads from the stream back to it by an inner width of at least its own, or holds experts,
    what stands beside it and does not is something else: a router, a low-rank branch, a gate for each layer's own
    embeddings.
    """
    by_child: dict[str, list[str]] = {}
    for name in names:
        by_child.setdefault(name.removeprefix(f"{block}.").partition(".")[0], []).append(name)
    whole = {child for child in by_child if _is_whole(by_child[child], named[f"{block}.{child}"], stream, shapes)}
    lists = {child for child in by_child if isinstance(named[f"{block}.{child}"], nn.ModuleList | nn.Sequential)}
    kept = whole | lists if whole - lists else by_child.keys()
    matrices = tuple(name for child, inside in by_child.items() if child in kept for name in inside)
    # behind a mixture's output a gate may be registered, behind shared weights what each place has of its own
    return output_last(matrices, stream, shapes) if whole - lists and shapes[matrices[-1]][1] != stream else matrices


def _is_whole(matrices: list[str], child: nn.Module, stream: int, shapes: Mapping[str, Shape]) -> bool:
    if is_matrix(child):
        return False
    if any(is_fused(m, parameter) for m in child.modules() for parameter in m.parameters(recurse=False)):
        return True
    taken, given = [shapes[name][0] for name in matrices], [shapes[name][1] for name in matrices]
    return len(matrices) > 1 and taken[0] == stream and stream in given[1:] and max(taken) >= stream <= max(given[:-1])


def linear_only(names: Iterable[str], named: Mapping[str, nn.Module]) -> list[str]:
    """Return the matrices of a token mixer without its convolutions; all where it has no others."""
    names = list(names)
    return [
        name for name in names if is_linear(getattr(named[name], "get_base_layer", lambda n=name: named[n])())
    ] or names
