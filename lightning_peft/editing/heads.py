"""Head offsets on a model's attention heads: where they are read, and the configuration of the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.backbone.heads import HeadSite, head_sites

if TYPE_CHECKING:
    from lightning_peft.tuners.head_offsets import HeadOffsetsConfig

__all__ = ["HeadSite", "head_offsets_config", "head_sites"]


def head_offsets_config(
    sites: Sequence[HeadSite],
    heads: Sequence[tuple[int, int]] | None = None,
    alpha: float = 1.0,
    positions: str = "answer",
    **options: Any,
) -> HeadOffsetsConfig:
    """Return the configuration of a head-offsets adapter on these sites.

    Args:
        sites: from `head_sites`.
        heads: `(layer, head)` pairs to give an offset; default every head.
        alpha: the strength.
        positions: `"answer"`, `"generated"` or `"all"`.
        **options: what else `HeadOffsetsConfig` takes: a gate.
    """
    from lightning_peft.tuners.head_offsets import HeadOffsetsConfig

    sizes = {site.name: site.head_dim for site in sites}
    chosen: dict[str, list[int]] | None = None
    if heads is not None:
        chosen = {}
        for layer, head in sorted(heads):
            chosen.setdefault(sites[layer].name, []).append(head)
    targets = None if chosen is not None else [site.name for site in sites]
    edited = {name: size for name, size in sizes.items() if chosen is None or name in chosen}
    # one number where it is the same everywhere, as folders have always had it
    head_dim = next(iter(sizes.values())) if len(set(sizes.values())) == 1 else edited
    return HeadOffsetsConfig(
        target_modules=targets, head_dim=head_dim, heads=chosen, alpha=alpha, positions=positions, **options
    )
