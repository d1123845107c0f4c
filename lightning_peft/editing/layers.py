"""Layer offsets on what a model's layers give: where they are read, and the configuration of the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.backbone.layers import LayerSite, layer_sites, stream_writers

if TYPE_CHECKING:
    from lightning_peft.tuners.layer_offsets import LayerOffsetsConfig

__all__ = ["LayerSite", "layer_offsets_config", "layer_sites", "stream_writers"]


def layer_offsets_config(
    sites: Sequence[LayerSite], alpha: float = 1.0, positions: str = "answer", **options: Any
) -> LayerOffsetsConfig:
    """Return the configuration of a layer-offsets adapter on these sites.

    Args:
        sites: from `layer_sites`.
        alpha: the strength.
        positions: in the language of `lightning_peft.tokens`.
        **options: what else `LayerOffsetsConfig` takes.
    """
    from lightning_peft.tuners.layer_offsets import LayerOffsetsConfig

    if len(widths := {site.width for site in sites}) != 1:
        raise ValueError(f"Sites of different widths ({sorted(widths)}) cannot share one adapter.")
    names = [site.name for site in sites]
    return LayerOffsetsConfig(target_modules=names, width=widths.pop(), alpha=alpha, positions=positions, **options)
