"""Where a matrix of an attention stands in the CP tensor: its kind, its layer, its heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.backbone.heads import HeadSite, head_sites
from lightning_peft.backbone.modules import base_modules
from lightning_peft.backbone.projections import projections
from lightning_peft.backbone.structure import Span, blocks, matrix_shape

Fused = Literal["concatenated", "interleaved"]
MATRICES = ("q", "k", "v", "o")  # the rows of C_m
FUSED: tuple[Fused, ...] = ("concatenated", "interleaved")
SIZES = ("layer", "width", "heads", "own_heads", "head_dim")

# how one matrix for queries, keys and values orders its outputs: no structure tells, so these were looked up, in
# transformers' forward functions, by `model_type`
_ORDERS: Mapping[str, Fused] = {
    "bloom": "interleaved",
    "gpt2": "concatenated",
    "gpt_neox": "interleaved",
    "mpt": "concatenated",
    "openai-gpt": "concatenated",
    "persimmon": "interleaved",
    "phi3": "concatenated",
}


class Group(NamedTuple):
    """What matrices that share one CP tensor have alike."""

    width: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Place:
    """Where a matrix stands in the CP tensor.

    Args:
        matrix: `"q"`, `"k"`, `"v"` or `"o"`; of one for the first three, the order of its outputs: `"concatenated"`
            (all heads' queries, then keys, then values) or `"interleaved"` (query, key and value of each head).
        layer: its row of C_l.
        width: its features at the side of the residual stream.
        heads: the query heads of its attention.
        own_heads: the heads that it has itself, of keys and values with grouped queries fewer; of one for all, those
            of keys and values.
        head_dim: the width of a head.
    """

    matrix: str
    layer: int
    width: int
    heads: int
    own_heads: int
    head_dim: int

    @property
    def group(self) -> Group:
        """What it has in common with all that share its tensor."""
        return Group(self.width, self.heads, self.head_dim)

    @property
    def shape(self) -> tuple[int, int]:
        """The inputs and outputs of the matrix."""
        fused = {"interleaved": 3 * self.heads, "concatenated": self.heads + 2 * self.own_heads}
        across = self.head_dim * fused.get(self.matrix, self.own_heads)
        return (across, self.width) if self.matrix == "o" else (self.width, across)

    def as_json(self) -> dict[str, Any]:
        """Return the place as a configuration keeps it."""
        return asdict(self)

    @classmethod
    def from_json(cls, name: str, values: Any) -> Place:
        """Return the place that `as_json` described.

        Raises:
            ValueError: it does not describe one.
        """
        known = isinstance(values, Mapping) and values.keys() == {"matrix", *SIZES}
        if known and values["matrix"] in (*MATRICES, *FUSED):
            layer, *sizes = (values[size] for size in SIZES)
            whole = all(type(size) is int for size in (layer, *sizes)) and layer >= 0 and min(sizes) > 0
            if whole and values["own_heads"] <= values["heads"]:
                return cls(**values)
        raise ValueError(
            f"The place of {name} is one of {', '.join((*MATRICES, *FUSED))} with {SIZES}, got {values!r}."
        )

    def low_rank(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """Return the factors A `[r, inputs]` and B `[outputs, r]` of what LoRTA adds to the matrix at strength 1.

        Of queries, keys and values the heads are slices of the outputs, of the output projection those of the inputs.
        """
        a, b, layers, heads, matrices = tensors

        def coefficients(matrix: str, count: int) -> Tensor:
            return heads[:count] * (matrices[MATRICES.index(matrix)] * layers[self.layer])

        if self.matrix in MATRICES:
            c = coefficients(self.matrix, self.own_heads)
        elif self.matrix == "interleaved":
            c = torch.stack([coefficients(matrix, self.heads) for matrix in "qkv"], 1).flatten(0, 1)
        else:
            counts = {"q": self.heads, "k": self.own_heads, "v": self.own_heads}
            c = torch.cat([coefficients(matrix, count) for matrix, count in counts.items()])
        spread = (c[:, None, :] * b.T).flatten(0, 1)  # [heads * head_dim, r]
        return (spread.T, a) if self.matrix == "o" else (a.T, spread)


class Tensors(NamedTuple):
    """The factors of a CP tensor.

    Args:
        A: `[width, r]`.
        B: `[r, head_dim]`.
        layers: C_l, `[L, r]`.
        heads: C_h, `[H, r]`.
        matrices: C_m, `[4, r]`.
    """

    A: Tensor
    B: Tensor
    layers: Tensor
    heads: Tensor
    matrices: Tensor


def attention_matrices(model: nn.Module, within: str | None = None, num_heads: int | None = None) -> list[str]:
    """Return the full names of the matrices that give queries, keys and values, and of the output projections.

    Args:
        model: the backbone.
        within: the part of it that is meant, see `head_sites`; default its language model.
        num_heads: for models without a configuration, how many query heads there are.

    Raises:
        ValueError: it has no attention that is known.
    """
    return [name for _, span in _attentions(model, within, num_heads) for name in _roles(span)]


def find_places(
    model: nn.Module, names: Iterable[str], fused: Fused | None = None, num_heads: int | None = None
) -> dict[str, Place]:
    """Return the places of matrices in the CP tensors: one for all that have width, heads and head size alike.

    Each attention with one of these matrices is a layer: of an encoder-decoder the encoder's, the decoder's and those
    between them.

    Args:
        model: the backbone.
        names: full names of matrices.
        fused: the order of the outputs of one matrix for queries, keys and values; default, as it is known of some of
            transformers' models.
        num_heads: for models without a configuration, how many query heads there are.

    Raises:
        ValueError: one is no such matrix of an attention, or its heads cannot be told.
    """
    named, chosen = dict(base_modules(model)), set(names)
    rows: dict[Group, int] = {}
    places: dict[str, Place] = {}
    for site, span in _attentions(model, "all", num_heads):
        own = [_place(named, name, role, site, fused) for name, role in _roles(span).items() if name in chosen]
        for group in dict.fromkeys(place.group for _, place in own):
            row = rows.setdefault(group, 0)
            of_group = {name: place for name, place in own if place.group == group}
            places |= {name: Place(**{**place.as_json(), "layer": row}) for name, place in of_group.items()}
            rows[group] = row + 1
    if strange := sorted(chosen - places.keys()):
        raise ValueError(
            f"{strange[0]} gives no queries, keys or values of an attention, nor its output, and LoRTA adapts nothing "
            "else: leave it out of the target_modules."
        )
    return places


def _attentions(model: nn.Module, within: str | None, num_heads: int | None = None) -> Iterable[tuple[HeadSite, Span]]:
    sites = {site.name: site for site in head_sites(model, num_heads=num_heads, within=within)}
    return [(sites[s.last], s) for block in blocks(model) for s in block.attention if s.last in sites]


def _roles(span: Span) -> dict[str, str]:
    """Return the kinds of an attention's matrices, by name; of one that gives queries and perhaps more, `"q"`."""
    given = projections(span)
    found = {given.query: "q", given.key: "k", given.value: "v"}
    roles = {name: kind for name, kind in found.items() if name is not None and name != span.last}
    return {name: {**roles, span.last: "o"}[name] for name in span.matrices if name in roles or name == span.last}


def _place(
    named: Mapping[str, nn.Module], name: str, role: str, site: HeadSite, fused: Fused | None
) -> tuple[str, Place]:
    inputs, outputs = matrix_shape(named[name])
    width, across = (outputs, inputs) if role == "o" else (inputs, outputs)
    count, left = divmod(across, site.head_dim)
    if left or count < 1 or (role == "q" and count < site.num_heads) or (role in "kv" and count > site.num_heads):
        raise ValueError(
            f"{name} has {across} features at the side of the heads, which are not those of {site.num_heads} heads of "
            f"{site.head_dim}, as {site.name} takes them: leave it out of the target_modules."
        )
    matrix, own = role, count
    if role == "q" and count > site.num_heads:
        order = fused or _ORDERS.get(_model_type(named, name))
        own, left = divmod(count - site.num_heads, 2)
        if order is None:
            raise ValueError(
                f"{name} gives queries, keys and values in one, and in which order is not known of this model: give "
                f"fused={FUSED[0]!r} (all queries, all keys, all values) or {FUSED[1]!r} (those of each head)."
            )
        if left or not 0 < own <= site.num_heads or (order == "interleaved" and own != site.num_heads):
            raise ValueError(
                f"{name} gives {count} slices of {site.head_dim} features, which are not {order} queries, keys and "
                f"values of {site.num_heads} heads: leave it out of the target_modules."
            )
        matrix = order
    return name, Place(matrix, 0, width, site.num_heads, own, site.head_dim)


def _model_type(named: Mapping[str, nn.Module], name: str) -> str:
    """Return the `model_type` that the configuration nearest to a module declares."""
    while True:
        config: Any = getattr(named.get(name), "config", None)
        if isinstance(kind := getattr(config, "model_type", None), str):
            return kind
        if not name:
            return ""
        name = name.rpartition(".")[0]
