"""Find, in each layer, the projection whose input is the concatenation of the attention heads' outputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from lightning_peft.tuners.modules import base_modules

if TYPE_CHECKING:
    from lightning_peft.tuners.head_offsets import HeadOffsetsConfig

# The last two parts of a projection's name: LLaMA-likes, GPT-2, GPT-NeoX, OPT.
_SITES = r"self_attn\.o_proj|attn\.c_proj|attention\.dense|self_attn\.out_proj"


@dataclass(frozen=True)
class HeadSite:
    """One layer's output projection.

    Args:
        name: the module's full name in the backbone, adapters' wrappers left out.
        layer: the layer's number, from 0.
        num_heads: query heads whose outputs enter the projection.
        head_dim: the width of one head; the projection takes `num_heads * head_dim` features.
    """

    name: str
    layer: int
    num_heads: int
    head_dim: int


def head_sites(model: nn.Module, pattern: str | None = None, num_heads: int | None = None) -> list[HeadSite]:
    """The head sites of a model, by layer.

    The number of heads is the configuration's number of *query* heads (with grouped queries those are what reaches
    the projection), and the head size is the projection's input width divided by it: `hidden_size / num_heads` is
    wrong where a configuration sets `head_dim`.

    Args:
        model: the backbone; PEFT-wrapped and quantised projections are looked through.
        pattern: for other architectures, a regular expression for the end of the projections' names.
        num_heads: for models without a configuration, how many heads enter each projection.

    Returns:
        One site a layer, first layer first.

    Raises:
        ValueError: no projection is found, the number of heads is unknown, or a width does not fit it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                          num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=40))
        >>> head_sites(model)[1]
        HeadSite(name='model.layers.1.self_attn.o_proj', layer=1, num_heads=4, head_dim=16)
    """
    ends_like = re.compile(rf"(?:^|.*\.)(?:{pattern or _SITES})$")
    found = [(name, module) for name, module in base_modules(model) if ends_like.match(name)]
    if not found:
        raise ValueError(
            f"No attention output projection was found in {type(model).__name__}: give the end of their names as "
            r"a regular expression, e.g. pattern=r'attn\.proj'."
        )
    config = getattr(model, "config", None)
    count = num_heads or getattr(config, "num_attention_heads", None)
    if not count:
        raise ValueError(
            f"{type(model).__name__} has no configuration that says how many heads it has: give num_heads (ITI's "
            "heads_per_layer)."
        )
    sites = []
    for layer, (name, module) in enumerate(sorted(found, key=lambda item: _numbers(item[0]))):
        width = _input_width(module)
        if width is None or width % count:
            raise ValueError(f"{name} takes {width} features, which {count} heads cannot share equally.")
        declared = getattr(config, "head_dim", None)
        if declared and declared * count != width:
            raise ValueError(f"{name} takes {width} features, but the configuration says {count} heads of {declared}.")
        sites.append(HeadSite(name, layer, count, width // count))
    return sites


def head_offsets_config(
    sites: Sequence[HeadSite],
    heads: Sequence[tuple[int, int]] | None = None,
    alpha: float = 1.0,
    positions: str = "answer",
) -> HeadOffsetsConfig:
    """The configuration of a head-offsets adapter on these sites.

    Args:
        sites: from `head_sites`.
        heads: `(layer, head)` pairs to give an offset; default every head.
        alpha: the strength.
        positions: `"answer"`, `"generated"` or `"all"`.
    """
    from lightning_peft.tuners.head_offsets import HeadOffsetsConfig

    sizes = {site.head_dim for site in sites}
    if len(sizes) != 1:
        raise ValueError(f"Heads of different sizes ({sorted(sizes)}) cannot share one adapter.")
    chosen: dict[str, list[int]] | None = None
    if heads is not None:
        chosen = {}
        for layer, head in sorted(heads):
            chosen.setdefault(sites[layer].name, []).append(head)
    targets = None if chosen is not None else [site.name for site in sites]
    return HeadOffsetsConfig(
        target_modules=targets, head_dim=sizes.pop(), heads=chosen, alpha=alpha, positions=positions
    )


def _numbers(name: str) -> tuple[int, ...]:
    """The numbers in a name, so that layer 10 comes after layer 9."""
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def _input_width(module: nn.Module) -> int | None:
    if hasattr(module, "in_features"):
        return int(module.in_features)  # type: ignore[arg-type]
    if type(module).__name__ == "Conv1D":  # transformers' Conv1D keeps its weight as [inputs, outputs]
        return int(module.weight.shape[0])  # type: ignore[union-attr, operator, index]
    return None
