"""Find the places of adapters at a whole part of a block: its first and its last matrix."""

from __future__ import annotations

from torch import nn

from lightning_peft.backbone.modules import base_modules
from lightning_peft.backbone.structure import Span, blocks, matrix_shape
from lightning_peft.backbone.targets import Layers, choose_targets, choose_with_experts


def part_ends(backbone: nn.Module, attention: bool, layers: Layers | list[int] | None = None) -> list[Span]:
    """Return the feed-forward parts of the backbone's blocks, with `attention` those parts too, in order.

    Args:
        backbone: any module with repeated blocks.
        attention: whether attention parts (cross-attention too) are among them.
        layers: which blocks; default all.

    Raises:
        ValueError: there are none, a block that was asked for does not exist, a feed-forward part is a mixture of fused
            experts, or a part's output is not as wide as its input: there its last matrix is not what gives the output.
    """
    members, named = blocks(backbone), dict(base_modules(backbone))
    spans = {span.last: span for block in members for span in (block.spans() if attention else (block.mlp,)) if span}
    mixtures = {block.experts[0]: block for block in members if block.experts}
    if not spans and not mixtures:
        needed = "an attention or feed-forward part" if attention else "a feed-forward part"
        raise ValueError(f"{type(backbone).__name__} has no block with {needed}: name the target_modules.")
    if choose_with_experts(backbone, list(spans), list(mixtures), layers)[1]:
        raise ValueError(
            f"The feed-forward parts of {type(backbone).__name__} are mixtures of experts, fused into parameters such "
            f"as {next(iter(mixtures))}, and no matrix gives their output: name target_modules where the callback "
            'takes them, or adapt the experts by LoRA(within="mlp") or FullFineTuning(within="mlp").'
        )
    chosen = [spans[name] for name in choose_targets(backbone, list(spans), layers)]
    for span in chosen:
        inputs, outputs = matrix_shape(named[span.first])[0], matrix_shape(named[span.last])[1]
        if inputs != outputs:
            raise ValueError(
                f"{span.first} takes {inputs} features, but {span.last} gives {outputs}, so they are not the ends of "
                "one part: name the target_modules."
            )
    return chosen


def attentions(backbone: nn.Module, layers: Layers | list[int] | None = None) -> list[Span]:
    """Return the attentions of the backbone's blocks, cross-attention too, in order.

    Args:
        backbone: any module with repeated blocks.
        layers: which blocks; default all.

    Raises:
        ValueError: there are none, or a block that was asked for does not exist.
    """
    spans = {span.first: span for block in blocks(backbone) for span in block.attention}
    if not spans:
        raise ValueError(f"{type(backbone).__name__} has no block with an attention in it.")
    return [spans[name] for name in choose_targets(backbone, list(spans), layers)]
