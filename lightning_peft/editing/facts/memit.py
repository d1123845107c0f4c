"""Mass-editing: many facts at once, spread over several layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from lightning_peft.backbone.structure import blocks
from lightning_peft.editing.facts.fact import Fact
from lightning_peft.editing.facts.keys import KeyMoments
from lightning_peft.editing.facts.prompt_tokens import Tokenizer
from lightning_peft.editing.facts.reference import reference_memit
from lightning_peft.editing.facts.rome import check_facts, told
from lightning_peft.editing.facts.update import Factors, KnowledgeEdit, acting, least_squares
from lightning_peft.editing.facts.values import Search, Value, find_values, hooked, read_at_subject


def compute_memit(
    model: nn.Module,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    moments: KeyMoments,
    prefixes: Sequence[str] = ("",),
    search: Search | None = None,
    shrinkage: float = 0.01,
    mom2_update_weight: float | None = None,
    values: Sequence[Value] | None = None,
    reference: bool = False,
) -> KnowledgeEdit:
    """Rewrite many facts at once over several layers (MEMIT; Meng et al. 2023, arXiv:2210.07229, algorithm 1).

    For each fact the value is searched for at the last of the layers: the state z that the residual stream should have
    behind it at the subject's last token. Then, layer by layer, what is still missing is shared equally among the
    layers that remain, and each is changed by `Δ = R Kᵀ (λC + K Kᵀ)⁻¹`, keys and states being those of the model with
    the changes made so far. Each layer's change has the rank of the number of facts.

    Args:
        model, tokenizer, facts, prefixes, shrinkage: as `compute_rome`.
        moments: from `key_moments`, of the layers to edit, ascending.
        search: how values are searched for; default as `Search`, with `clamp_norm_factor=0.75`, the authors'.
        mom2_update_weight: λ, how much what the layers already hold counts against the new facts; default the width of
            the keys: since a typical key has `kᵀC⁻¹k` of that size, half of a lone fact's value is then written. The
            authors' 15,000 for GPT-J, whose keys are 16,384 wide, is about that.
        values: from `find_values` at the last of the layers, one a fact, where they are known.
        reference: compute it as the authors' code does, in its order (docs/methods/memit.md lists what differs).

    Raises:
        ValueError: as `compute_rome`; layers out of order; λ not above 0; values with `reference`; or a model that does
            not add its feed-forward part's output to the residual stream as it is.
    """
    check_facts(tokenizer, facts)
    sites, search = moments.sites, search or Search(clamp_norm_factor=0.75)
    layers = [site.layer for site in sites]
    if layers != sorted(set(layers)):
        raise ValueError(f"The layers must be given in ascending order, each once, but they are {layers}.")
    weight = float(sites[0].head_dim) if mom2_update_weight is None else mom2_update_weight
    if weight <= 0:
        raise ValueError(f"mom2_update_weight must be above 0, got {weight}.")
    if reference and values is not None:
        raise ValueError("The authors search for values otherwise than find_values: leave values out with reference.")
    covariances = [moments.matrix(i, shrinkage) for i in range(len(sites))]
    stream = next(block.name for block in blocks(model) if sites[-1].name.startswith(f"{block.name}."))
    _check_added(model, tokenizer, facts[0], sites[-1].name, stream)
    settings = {
        "layers": layers,
        "shrinkage": shrinkage,
        "tokens": moments.count,
        "mom2_update_weight": weight,
        "search": asdict(search),
    }
    record = {"method": "memit", "reference": reference, **settings}
    if reference:
        given = (model, tokenizer, facts, sites, covariances, stream, prefixes, search, weight)
        updates, states_searched = reference_memit(*given)
        return KnowledgeEdit(updates, {**record, "facts": told(facts, states_searched)})
    if values is None:
        values = find_values(model, tokenizer, facts, sites[-1], prefixes, search, reference=stream)
    before = read_at_subject(model, tokenizer, facts, stream, ("",))[1]
    targets = before + torch.stack([value.delta for value in values])
    factors: dict[str, Factors] = {}
    for i, site in enumerate(sites):
        with acting(model, factors):
            keys, _ = read_at_subject(model, tokenizer, facts, site.name, prefixes)
            _, states = read_at_subject(model, tokenizer, facts, stream, ("",))
        missing = (targets - states) / (len(sites) - i)
        factors[site.name] = least_squares(missing, keys, covariances[i], weight)
    return KnowledgeEdit(factors, {**record, "facts": told(facts, values)})


def _check_added(model: nn.Module, tokenizer: Tokenizer, fact: Fact, name: str, stream: str) -> None:
    """Refuse a block that normalises, say, what its feed-forward part gives before it joins the residual stream."""
    before = read_at_subject(model, tokenizer, [fact], stream, ("",))[1]
    shift = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)) * before.std()

    def add(_: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + shift.to(output)

    with hooked(model, {name: add}):
        moved = read_at_subject(model, tokenizer, [fact], stream, ("",))[1] - before
    if not torch.allclose(moved, shift, atol=0.05 * float(shift.abs().max())):
        raise ValueError(
            f"{stream} does not add the output of {name} to the residual stream as it is, on which MEMIT's sharing "
            "among layers rests: use ROME, which edits one layer."
        )
