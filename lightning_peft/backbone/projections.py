"""Find the matrices of an attention that give its queries, its keys and its values."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightning_peft.backbone.structure import Span


@dataclass(frozen=True)
class Projections:
    """Full names of an attention's matrices.

    Args:
        query: what gives the queries, and keys and values as well where there is one matrix for all.
        key: what gives the keys alone, or None.
        value: what gives the values alone, or None.
    """

    query: str
    key: str | None
    value: str | None


def projections(span: Span) -> Projections:
    """Tell queries, keys and values apart, by the names that models commonly give them; else the first gives all.

    Example:
        >>> projections(Span(("attn.k_proj", "attn.v_proj", "attn.q_proj", "attn.out_proj"))).query
        'attn.q_proj'
        >>> projections(Span(("attn.c_attn", "attn.c_proj")))
        Projections(query='attn.c_attn', key=None, value=None)
    """

    def named(pattern: str) -> str | None:
        return next((n for n in span.matrices if re.match(pattern, n.rsplit(".", 1)[-1])), None)

    query, key, value = (named(rf"w?({part})(_|$)") for part in ("q|query", "k|keys?", "v|values?"))
    return Projections(query or span.first, key, value)
