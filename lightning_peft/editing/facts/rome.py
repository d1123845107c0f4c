"""Rank-one model editing: one fact after the other, into one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from lightning_peft.backbone.heads import HeadSite
from lightning_peft.editing.facts.fact import Fact
from lightning_peft.editing.facts.keys import KeyMoments
from lightning_peft.editing.facts.prompt_tokens import Tokenizer, encode, with_object
from lightning_peft.editing.facts.reference import Target, reference_rome
from lightning_peft.editing.facts.update import Factors, KnowledgeEdit, acting, rank_one, stacked
from lightning_peft.editing.facts.values import Search, Value, find_values


def compute_rome(
    model: nn.Module,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    moments: KeyMoments,
    prefixes: Sequence[str] = ("",),
    search: Search | None = None,
    shrinkage: float = 0.01,
    reference: bool = False,
) -> KnowledgeEdit:
    """Rewrite facts in one layer by an update of rank 1 each (ROME; Meng et al. 2022, arXiv:2202.05262).

    For each fact: k* is the mean input of the layer's last feed-forward matrix at the subject's last token, v* the
    output there that makes the model say the new object, and W changes by `(v* − Wk*)(C⁻¹k*)ᵀ / (k*ᵀC⁻¹k*)`. With
    several facts each is computed on the model as the ones before left it, and the rank is their number.

    Args:
        model: a causal language model; adapters on it act, and the edit is computed on top of them.
        tokenizer: its (fast) tokenizer.
        facts: what it shall say.
        moments: from `key_moments`, of exactly one layer: the layer to edit.
        prefixes: from `random_prefixes`: contexts over which key and value are averaged.
        search: how the value is searched for.
        shrinkage: of the covariance, see `KeyMoments.matrix`; the authors' code has none.
        reference: compute it as the authors' code does, in its order (docs/methods/rome.md lists what differs).

    Raises:
        ValueError: no facts, more layers than one, a singular covariance; or as `find_values`.
    """
    site, search, moment = _prepare(tokenizer, facts, moments, search, shrinkage)
    if reference:
        update, targets = reference_rome(model, tokenizer, facts, site, moment, prefixes, search)
        return KnowledgeEdit({site.name: update}, _record(moments, shrinkage, search, facts, targets, reference))
    updates: list[Factors] = []
    values: list[Value] = []
    for fact in facts:
        with acting(model, {site.name: stacked(updates)} if updates else {}):
            values += find_values(model, tokenizer, [fact], site, prefixes, search)
        updates.append(rank_one(values[-1].delta, values[-1].key, moment))
    record = _record(moments, shrinkage, search, facts, values)
    return KnowledgeEdit({site.name: stacked(updates)}, record)


def compute_rome_each(
    model: nn.Module,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    moments: KeyMoments,
    prefixes: Sequence[str] = ("",),
    search: Search | None = None,
    shrinkage: float = 0.01,
    values: Sequence[Value] | None = None,
) -> list[KnowledgeEdit]:
    """Apply `compute_rome` to each fact alone, on the model as it is; the values are searched for together (faster).

    Args:
        model, tokenizer, facts, moments, prefixes, search, shrinkage: as `compute_rome`.
        values: from `find_values`, one a fact, where they are known.

    Returns:
        One edit a fact, of rank 1.
    """
    site, search, moment = _prepare(tokenizer, facts, moments, search, shrinkage)
    if values is None:
        values = find_values(model, tokenizer, facts, site, prefixes, search)
    return [
        KnowledgeEdit(
            {site.name: rank_one(value.delta, value.key, moment)},
            _record(moments, shrinkage, search, [fact], [value]),
        )
        for fact, value in zip(facts, values, strict=True)
    ]


def _prepare(
    tokenizer: Tokenizer, facts: Sequence[Fact], moments: KeyMoments, search: Search | None, shrinkage: float
) -> tuple[HeadSite, Search, Tensor]:
    check_facts(tokenizer, facts)
    if len(moments.sites) != 1:
        raise ValueError(f"ROME edits one layer, but keys of {len(moments.sites)} layers were read.")
    return moments.sites[0], search or Search(), moments.matrix(0, shrinkage)


def _record(
    moments: KeyMoments,
    shrinkage: float,
    search: Search,
    facts: Sequence[Fact],
    values: Sequence[Value | Target],
    reference: bool = False,
) -> dict[str, Any]:
    settings = {"layers": [moments.sites[0].layer], "shrinkage": shrinkage, "tokens": moments.count}
    return {
        "method": "rome",
        "reference": reference,
        **settings,
        "search": asdict(search),
        "facts": told(facts, values),
    }


def check_facts(tokenizer: Tokenizer, facts: Sequence[Fact]) -> None:
    """Refuse facts that cannot be told to a model, before anything is computed."""
    if not facts:
        raise ValueError("There is no fact to rewrite: give at least one.")
    encode(tokenizer, [prompt for fact in facts for prompt in with_object(fact, fact.new)])


def told(facts: Sequence[Fact], values: Sequence[Value | Target]) -> list[dict[str, Any]]:
    """Return each fact and how the search for its value ended, for the record."""
    return [
        {"prompt": fact.prompt, "subject": fact.subject, "new": fact.new, "log_prob": v.log_prob, "steps": v.steps}
        for fact, v in zip(facts, values, strict=True)
    ]
