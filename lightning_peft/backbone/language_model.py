"""The parts of a model that reads more than text: which of its blocks are the language model's."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_peft.backbone.block_parts import is_inside, outermost
from lightning_peft.backbone.modules import bare_name, base_modules
from lightning_peft.backbone.structure import Block, blocks

LANGUAGE, EVERYTHING = "language", "all"


def part_blocks(backbone: nn.Module, within: str | None = None) -> list[Block]:
    """Return the blocks of one part of a model.

    Args:
        backbone: any module, with or without adapters.
        within: None or `"language"`: the language model's, see `language_stacks`; `"vision"`, `"audio"` or another
            part that the configuration has by this name; the name of a submodule, such as `"model.visual"`; or `"all"`.

    Raises:
        ValueError: there is no such part, or it has no blocks.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> [block.name for block in part_blocks(model)]
        ['model.layers.0', 'model.layers.1']
    """
    members = blocks(backbone)
    parts = part_names(backbone, within)
    if parts is None:
        return members
    inside = [block for block in members if is_inside(block.name, parts)]
    if not inside:
        raise ValueError(f"There is no block within {within!r} of {type(backbone).__name__}: {_known(backbone)}.")
    return inside


def part_names(backbone: nn.Module, within: str | None = None) -> list[str] | None:
    """Return the names of the modules that make up a part; None where that is all of the model.

    The arguments and errors are those of `part_blocks`.
    """
    if within == EVERYTHING:
        return None
    if within is None or within == LANGUAGE:
        return language_stacks(backbone)
    named = dict(base_modules(backbone))
    if within in named:
        return [within]
    if parts := _configured(backbone, named, within):
        return parts
    if within in ("vision", "audio") and (language := language_stacks(backbone)):
        return sorted({block.stack for block in blocks(backbone)} - set(language))
    raise ValueError(
        f"within={within!r} is neither a submodule of {type(backbone).__name__} nor a part of it: {_known(backbone)}."
    )


def language_stacks(backbone: nn.Module) -> list[str] | None:
    """Return the names of the lists of blocks that the embeddings of tokens lead to, of a model that has others too.

    They are those nearest to the embedding that the model names as that of its input. A decoder that looks at an
    encoder's output has that encoder with it.

    Returns:
        The names; None where all blocks are the language model's, or which are cannot be told.
    """
    members = blocks(backbone)
    stacks = list(dict.fromkeys(block.stack for block in members))
    embedding = _embedding(backbone)
    if len(stacks) < 2 or embedding is None:
        return None
    crossed = {block.stack for block in members if block.cross}
    parent, nearest = embedding, list[str]()
    while parent and not nearest:
        parent = parent.rpartition(".")[0]
        around = [stack for stack in stacks if not parent or is_inside(stack, [parent])]
        depth = min((stack.count(".") for stack in around), default=0)
        nearest = [stack for stack in around if stack.count(".") == depth]
    if set(nearest) <= crossed:
        around = nearest
        while parent and len(around) == len(nearest):
            parent = parent.rpartition(".")[0]
            around = [stack for stack in stacks if not parent or is_inside(stack, [parent])]
        nearest = around
    elif (
        crossed
        and not crossed & set(nearest)
        and getattr(getattr(backbone, "config", None), "is_encoder_decoder", False)
    ):
        return None  # the embedding is an encoder's, as of a model that writes no text
    return nearest if len(nearest) < len(stacks) else None


def _embedding(backbone: nn.Module) -> str | None:
    """Return the name of the module that embeds tokens; None where there is none, or the model does not say."""
    find = getattr(backbone, "get_input_embeddings", None)
    try:
        module = find() if callable(find) else None
    except (NotImplementedError, AttributeError):
        return None
    if not isinstance(module, nn.Module) or not any(isinstance(m, nn.Embedding) for m in module.modules()):
        return None
    return next((bare_name(backbone, name) for name, m in backbone.named_modules() if m is module), None)


def _configured(backbone: nn.Module, named: dict[str, nn.Module], part: str) -> list[str]:
    """Return the outermost submodules made from the configuration that the model's has for a part."""
    config: Any = getattr(getattr(backbone, "config", None), f"{part}_config", None)
    if config is None:
        return []
    own = {name: module for name, module in named.items() if name}
    return outermost(own, lambda module: type(getattr(module, "config", None)) is type(config))


def _known(backbone: nn.Module) -> str:
    stacks = ", ".join(dict.fromkeys(block.stack for block in blocks(backbone))) or "none"
    return f'its lists of blocks are {stacks}; "language", "vision", "all" or the name of a submodule can be given'
