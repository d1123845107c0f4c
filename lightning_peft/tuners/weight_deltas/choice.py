"""Choose a backbone's parameters to train: by block, by part of a block, from the top, biases, matrices."""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

from lightning_peft.backbone.language_model import part_blocks
from lightning_peft.backbone.modules import is_matrix
from lightning_peft.backbone.structure import Block, blocks
from lightning_peft.backbone.targets import Layers, Within, split_within
from lightning_peft.tuners.weight_deltas.owners import Place, places

Biases = Literal["all", "query_and_second_mlp"]

_BIAS = re.compile(r"(\w+_)?bias(_\w+)?")  # also nn.MultiheadAttention's in_proj_bias and nn.LSTM's bias_ih_l0
_QUERY = re.compile(r"q|query|q_proj|q_lin|wq")


def choose_parameters(
    backbone: nn.Module, layers: Layers | list[int] | None = None, within: Within | None = None
) -> list[str]:
    """Return the full names of the backbone's parameters, all of them or those of some blocks.

    Args:
        backbone: any module, with or without adapters; parameters that modules share are named once.
        layers: which blocks, see `structure.blocks`; default everything, what stands outside the blocks too.
        within: only the matrices of the blocks' attention, or of their feed-forward parts, and those matrices' biases;
            or another part of the model, see `backbone.targets.choose_targets`.

    Raises:
        ValueError: the backbone has no blocks, not that many or not these, or none with such a part.
    """
    return [place.full_name for place in _chosen(backbone, layers, within, missing=False)]


def choose_biases(
    backbone: nn.Module,
    parts: Biases = "all",
    add_missing: bool = False,
    layers: Layers | list[int] | None = None,
    within: Within | None = None,
) -> list[str]:
    """Return the full names of the backbone's biases.

    Args:
        backbone: any module, with or without adapters.
        parts: `"all"`, or of each attention's query matrix and each feed-forward part's last matrix.
        add_missing: also those that linear layers and convolutions could have and have not, but the output embedding.
        layers: which blocks; default everything.
        within: as in `choose_parameters`.

    Raises:
        ValueError: there are no such biases, or a query has no matrix of its own.
    """
    get_output = getattr(backbone, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    biases = [
        place
        for place in _chosen(backbone, layers, within, add_missing)
        if _BIAS.fullmatch(place.name) and (place.parameter is not None or place.owner is not output)
    ]
    if parts == "query_and_second_mlp":
        owners = {matrix for block in blocks(backbone) for matrix in _query_and_second_mlp(block)}
        biases = [place for place in biases if place.full_name.rpartition(".")[0] in owners]
    elif parts != "all":
        raise ValueError(f'parts must be "all" or "query_and_second_mlp", got {parts!r}.')
    if not biases:
        advice = "it has no matrices that could" if add_missing else "add_missing=True gives its matrices zero ones"
        raise ValueError(f"{type(backbone).__name__} has no such biases to train: {advice}.")
    return [place.full_name for place in biases]


def choose_top(backbone: nn.Module, k: int, final_norm: bool = True, head: bool = True) -> list[str]:
    """Return the full names of the parameters of the last k blocks, and of what stands after them.

    Args:
        backbone: any module with repeated blocks; the last k of an encoder's and of a decoder's are both taken.
        k: how many blocks.
        final_norm: also the normalisation after the last block.
        head: also what else comes after, such as an output embedding; not where it is tied to the input embedding.

    Raises:
        ValueError: the backbone has fewer blocks.
    """
    chosen = choose_parameters(backbone, Layers(last=k))
    stacks = dict.fromkeys(block.stack for block in part_blocks(backbone))
    every = [where[0] for where in places(backbone)]
    inside = [any(place.full_name.startswith(f"{stack}.") for stack in stacks) for place in every]
    after = [place for i, place in enumerate(every) if not inside[i] and any(inside[:i])]
    norms = [place for place in after if "Norm" in type(place.owner).__name__]
    if not norms:  # registered before the blocks that it comes after, beside their list
        beside = {stack.rpartition(".")[0] for stack in stacks}
        norms = [
            place
            for place, within in zip(every, inside, strict=True)
            if not within
            and "Norm" in type(place.owner).__name__
            and place.full_name.rpartition(".")[0].rpartition(".")[0] in beside
        ]
    rest = [place for place in after if place not in norms]
    return chosen + [p.full_name for p in norms if final_norm] + [p.full_name for p in rest if head]


def choose_matrices(backbone: nn.Module) -> list[str]:
    """Return the full names of the weights of linear layers and convolutions that no embedding shares."""
    return [
        where[0].full_name
        for where in places(backbone)
        if where[0].name == "weight" and all(is_matrix(place.owner) for place in where)
    ]


def _chosen(
    backbone: nn.Module, layers: Layers | list[int] | None, within: Within | None, missing: bool
) -> list[Place]:
    every = [where[0] for where in places(backbone, missing)]
    if layers is None and within is None:
        return every
    kind, part = split_within(within, backbone)
    some = _some_blocks(backbone, layers, part)
    if kind is None:
        starts = tuple(f"{block.name}." for block in some)
        return [place for place in every if place.full_name.startswith(starts)]
    spans = [span for b in some for span in (b.attention if kind == "attention" else filter(None, (b.mlp,)))]
    owners = {name for span in spans for name in span.matrices}
    experts = {name for block in some for name in block.experts} if kind == "mlp" else set()
    if not owners and not experts:
        raise ValueError(f"{type(backbone).__name__} has no block with {kind} in it.")
    return [p for p in every if p.full_name.rpartition(".")[0] in owners or p.full_name in experts]


def _some_blocks(backbone: nn.Module, layers: Layers | list[int] | None, part: str | None) -> list[Block]:
    every = part_blocks(backbone, part)
    if not every:
        raise ValueError(f"{type(backbone).__name__} has no repeated blocks to choose among.")
    if layers is None:
        return every
    numbers: dict[str, list[int]] = {}
    for block in every:
        numbers.setdefault(block.stack, []).append(block.number)
    if isinstance(layers, Layers):
        chosen = {stack: set(layers.choose(known)) for stack, known in numbers.items()}
    else:
        highest = max(map(len, numbers.values())) - 1
        if absent := [number for number in layers if not 0 <= number <= highest]:
            raise ValueError(f"There is no block {absent[0]}: the blocks are 0 to {highest}.")
        chosen = {stack: set(layers) for stack in numbers}
    return [block for block in every if block.number in chosen[block.stack]]


def _query_and_second_mlp(block: Block) -> list[str]:
    queries = []
    for span in block.attention:
        query_names = [name for name in span.matrices if _QUERY.fullmatch(name.rpartition(".")[2])]
        if not query_names:
            matrices = ", ".join(name.rpartition(".")[2] for name in span.matrices)
            raise ValueError(f"{block.name} has no matrix of its own for the query, but {matrices}.")
        queries += query_names
    return queries + ([block.mlp.last] if block.mlp else [])
