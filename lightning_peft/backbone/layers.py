"""Find what whole layers give: blocks, their attention, their feed-forward part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from lightning_peft.backbone.block_parts import is_inside
from lightning_peft.backbone.heads import Part
from lightning_peft.backbone.language_model import part_blocks
from lightning_peft.backbone.modules import base_modules
from lightning_peft.backbone.structure import Block, blocks, matrix_shape, width

Kind = Literal["block", "attention", "mlp"]
KINDS: tuple[str, ...] = ("block", "attention", "mlp")


@dataclass(frozen=True)
class LayerSite:
    """A module whose output is read.

    Args:
        name: the module's full name in the backbone, adapters' wrappers left out.
        layer: its place among the sites, from 0.
        kind: `"block"`, the residual stream behind a block; `"attention"` or `"mlp"`, what that part adds to it.
        width: of the output.
        part: as `HeadSite`'s.
    """

    name: str
    layer: int
    kind: Kind
    width: int
    part: Part = "self"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is read at one token."""
        return (self.width,)


def layer_sites(
    model: nn.Module, kind: Kind = "block", part: Part | None = None, within: str | None = None
) -> list[LayerSite]:
    """Return the blocks of a model, or their attentions or feed-forward parts, in the order in which they stand.

    Args:
        model: the backbone; adapters, quantised and compiled modules are looked through.
        kind: what is read. A block's output is what the next one gets; an attention's is its output projection's, a
            feed-forward part's that of the module, experts and all, or where it is none the last matrix's.
        part: only an encoder-decoder's `"encoder"` or its decoder (`"self"`; `"cross"` for its cross-attention).
        within: as `head_sites`'.

    Raises:
        ValueError: an unknown kind, or no such part.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> layer_sites(model)[1]
        LayerSite(name='model.layers.1', layer=1, kind='block', width=32, part='self')
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    named, all_blocks = dict(base_modules(model)), part_blocks(model, within)
    crossed = {block.stack for block in all_blocks if block.cross}
    sites: list[tuple[str, int, Part]] = []
    for block in all_blocks:
        role: Part = "encoder" if crossed and block.stack not in crossed else "self"
        if kind == "attention":
            for span in block.attention:
                sites.append((span.last, matrix_shape(named[span.last])[1], "cross" if span in block.cross else role))
            continue
        inner = block.spans()
        name = block.name if kind == "block" else _mlp(block, named)
        if inner and name is not None:
            sites.append((name, matrix_shape(named[inner[0].last])[1], role))
    sites = [site for site in sites if part is None or site[2] == part]
    if not sites:
        raise ValueError(f"{type(model).__name__} has no {kind} whose output could be read.")
    return [LayerSite(name, i, kind, width, role) for i, (name, width, role) in enumerate(sites)]


def stream_writers(model: nn.Module, within: str | None = None) -> list[str]:
    """Return the names of what writes to the residual stream: embeddings, output projections, feed-forward parts.

    A feed-forward part writes by its last matrix, or, where experts share it, as a whole.

    Args:
        model: the backbone.
        within: as `head_sites`'.

    Raises:
        ValueError: there is no embedding of that width, as in a model of pictures.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> stream_writers(model)
        ['model.embed_tokens', 'model.layers.0.self_attn.o_proj', 'model.layers.0.mlp.down_proj']
    """
    named, all_blocks = dict(base_modules(model)), part_blocks(model, within)
    size = width(model, all_blocks)
    others = {block.stack for block in blocks(model)}
    names = [
        name
        for name, module in named.items()
        if isinstance(module, nn.Embedding) and module.embedding_dim == size and not is_inside(name, others)
    ]
    if not names:
        raise ValueError(f"{type(model).__name__} has no embedding of width {size} that writes to its residual stream.")
    for block in all_blocks:
        names += [span.last for span in (*block.attention, *block.mixers)]
        if block.mlp is not None:
            experts = any(p.dim() > 2 for p in block.module.parameters())
            names.append((_mlp(block, named) if experts else None) or block.mlp.last)
    return names


def _mlp(block: Block, named: dict[str, nn.Module]) -> str | None:
    """Return the one child of a block that is its feed-forward part; else that part's last matrix."""
    inside = [*block.experts, *(block.mlp.matrices if block.mlp else ())]
    children = {name.removeprefix(f"{block.name}.").partition(".")[0] for name in inside} or {
        name for name, child in block.module.named_children() if any(p.dim() > 1 for p in child.parameters())
    }
    mixing = [name for span in (*block.attention, *block.mixers) for name in span.matrices]
    children = {child for child in children if not any(is_inside(name, [f"{block.name}.{child}"]) for name in mixing)}
    name = f"{block.name}.{next(iter(children))}" if len(children) == 1 else None
    if name in named:
        return name
    return block.mlp.last if block.mlp else None
