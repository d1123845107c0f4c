"""Find, in each layer, the projection whose input is the concatenation of the attention heads' outputs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from lightning_peft.backbone.block_parts import is_inside
from lightning_peft.backbone.language_model import part_names
from lightning_peft.backbone.modules import base_modules
from lightning_peft.backbone.structure import Block, Span, blocks, matrix_shape

Part = Literal["self", "cross", "encoder"]

# what modules and configurations call the number of query heads, and the width of one head's output
_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
_WIDTHS = ("v_head_dim", "head_dim", "attention_head_size", "d_kv", "key_value_proj_dim")


@dataclass(frozen=True)
class HeadSite:
    """One attention's output projection.

    Args:
        name: the module's full name in the backbone, adapters' wrappers left out.
        layer: its place among the model's sites, from 0; where each block has one attention, the block's number.
        num_heads: query heads whose outputs enter the projection.
        head_dim: the width of one head; the projection takes `num_heads * head_dim` features.
        part: `"self"`, the model's own attention; `"cross"`, a decoder's to its encoder's output; `"encoder"`, an
            encoder's own in an encoder-decoder.
    """

    name: str
    layer: int
    num_heads: int
    head_dim: int
    part: Part = "self"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is read at one token."""
        return (self.num_heads, self.head_dim)


def head_sites(
    model: nn.Module,
    pattern: str | None = None,
    num_heads: int | None = None,
    part: Part | None = None,
    within: str | None = None,
) -> list[HeadSite]:
    """Return the head sites of a model, by layer.

    They are found by structure: the matrix that leads from an attention back to the residual stream. The number of
    heads is that of the *query* heads (with grouped queries those are what reaches the projection), as the attention
    module or the nearest configuration gives it; the head size is the projection's input width divided by it, since
    `hidden_size / num_heads` is wrong where a configuration sets `head_dim`.

    Args:
        model: the backbone; PEFT-wrapped, quantised and compiled modules are looked through.
        pattern: for other architectures, a regular expression for the end of the projections' names.
        num_heads: for models without a configuration, how many heads enter each projection.
        part: only those sites, of an encoder-decoder; default all, in the order in which they run.
        within: only those of this part of the model, `"vision"`, `"all"` or a submodule's name, see `part_names`.
            Default the language model's, of one that sees pictures or hears too.

    Returns:
        One site an attention, first layer first.

    Raises:
        ValueError: no projection is found, the number of heads is unknown, or a width does not fit it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                          num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=40))
        >>> head_sites(model)[1]
        HeadSite(name='model.layers.1.self_attn.o_proj', layer=1, num_heads=4, head_dim=16, part='self')
    """
    named = dict(base_modules(model))
    if pattern is None:
        outputs = list(_by_structure(model))
    else:
        ends_like = re.compile(rf"(?:^|.*\.)(?:{pattern})$")
        outputs = [(name, _part_of(name, ())) for name in sorted(filter(ends_like.match, named), key=_numbers)]
    parts = part_names(model, within)
    inside = outputs if parts is None else [(name, role) for name, role in outputs if is_inside(name, parts)]
    # a pattern may name what is in no list of blocks
    outputs = inside if inside or within is not None or pattern is None else outputs
    if part is None and _lacks_encoder(model):
        outputs = [(name, role) for name, role in outputs if role != "cross"]
    outputs = [(name, role) for name, role in outputs if part is None or role == part]
    if not outputs:
        raise ValueError(
            f"No attention output projection was found in {type(model).__name__}: give the end of their names as "
            r"a regular expression, e.g. pattern=r'attn\.proj'."
        )
    sites = [_site(model, named, name, num_heads) for name, _ in outputs]
    return [replace(site, layer=i, part=role) for i, (site, (_, role)) in enumerate(zip(sites, outputs, strict=True))]


def _lacks_encoder(model: nn.Module) -> bool:
    """Return whether a decoder stands alone, so that its attentions to an encoder's output do not run."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "is_encoder_decoder", None) is False and not any(
        block.attention and not block.cross for block in blocks(model)
    )


def _by_structure(model: nn.Module) -> Iterator[tuple[str, Part]]:
    """Yield the output projection of every attention, block by block, and the part of the model it is in."""
    attending, named = [block for block in blocks(model) if block.attention], dict(base_modules(model))
    for block in attending:
        for span in block.attention:
            _check_last(named, span, block.stream)
            yield span.last, "cross" if span in block.cross else _part_of(block.name, attending)


def _check_last(named: dict[str, nn.Module], span: Span, stream: int) -> None:
    """Check that a projection of a kind of its own, no matrix to `blocks`, has not left its place to another."""
    paths = [name.split(".") for name in span.matrices]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    attention = ".".join(parts[0] for parts in shared)
    for name, module in named.items():
        inside = name.startswith(f"{attention}.") and not any(name.startswith(matrix) for matrix in span.matrices)
        unknown = inside and not isinstance(module, nn.Embedding)
        if unknown and any(_may_lead_to(stream, parameter) for parameter in module.parameters(recurse=False)):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which may be the output projection of {attention}: give the "
                "end of the projections' names as a regular expression, the argument pattern."
            )


def _may_lead_to(stream: int, parameter: nn.Parameter) -> bool:
    """Return whether a parameter may be a matrix to the stream; the shape of a packed one does not say it."""
    return parameter.dim() > 1 and (stream in parameter.shape or not parameter.is_floating_point())


def _part_of(name: str, attending: Sequence[Block]) -> Part:
    """Return the part of the model a module is in; an encoder is one only where another stack looks at it."""
    crossed = {block.stack for block in attending if block.cross}
    return "encoder" if crossed and not any(name.startswith(f"{stack}.") for stack in crossed) else "self"


def _site(model: nn.Module, named: dict[str, nn.Module], name: str, num_heads: int | None) -> HeadSite:
    try:
        width, _ = matrix_shape(named[name])
    except ValueError:
        raise ValueError(
            f"{name} is a {type(named[name]).__name__}, not a projection: give a pattern that ends there."
        ) from None
    count = num_heads or _declared(named, name, _COUNTS)
    if not count:
        raise ValueError(
            f"{type(model).__name__} has no configuration that says how many heads it has: give num_heads (ITI's "
            "heads_per_layer)."
        )
    if width % count:
        raise ValueError(f"{name} takes {width} features, which {count} heads cannot share equally.")
    declared = None if num_heads else _declared(named, name, _WIDTHS)
    if declared and declared * count != width:
        raise ValueError(f"{name} takes {width} features, but the configuration says {count} heads of {declared}.")
    return HeadSite(name, 0, count, width // count)


def _declared(named: dict[str, nn.Module], name: str, keys: Sequence[str]) -> int | None:
    """Return the value that the nearest module around a projection declares, itself or in its configuration.

    An attention knows best: an encoder-decoder has two numbers of heads, and a model of pictures and text two
    configurations.
    """
    while name:
        name = name.rpartition(".")[0]
        module = named.get(name)
        for source in (module, getattr(module, "config", None)):
            for key in keys:
                value: Any = getattr(source, key, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
    return None


def _numbers(name: str) -> tuple[int, ...]:
    """Return the numbers in a name, so that layer 10 comes after layer 9."""
    return tuple(int(part) for part in name.split(".") if part.isdigit())
