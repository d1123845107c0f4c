"""Directional ablation as one callback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Unpack

from torch import Tensor, nn

from lightning_peft.backbone.layers import LayerSite, layer_sites, stream_writers
from lightning_peft.editing.contrast import ablation_direction
from lightning_peft.fitting.edit_layers import StatementLayers
from lightning_peft.fitting.reading_edit import ReadingOptions


class Ablation(StatementLayers):
    """Directional ablation (Arditi et al. 2024, arXiv:2406.11717): take one direction out of the residual stream.

    `trainer.fit` reads the stream behind one block at the last token of labelled statements; the difference in means
    between true and false ones, at unit length, is the direction d. The adapter then turns each output x that it sits
    on into `x - alpha * (x · d) d`: at `alpha=1` nothing of d is left, negative strengthens it. The training batches
    are as `ITI`'s.

    Args:
        layer: the block behind which the direction is read, from 0; default the middle one.
        sites: where it is taken out: `"writes"`, of all that writes to the stream (embeddings, output projections,
            feed-forward parts), which is the paper's weight orthogonalisation and can be merged; or of every
            `"block"`, `"attention"` or `"mlp"`.
        alpha: the strength, 1 being whole.
        positions: `"all"` (the paper's), or as `CAA`'s.

    Attributes:
        edit_: the computed `LayerEdit` after `fit`: the direction `[1, width]`.

    Raises:
        ValueError: in one sentence, as `CAA`.
        RuntimeError: fit ended before the pass did, so that nothing was computed.
    """

    default_name = "ablation"

    operation = "ablate"

    def __init__(
        self,
        layer: int | None = None,
        sites: Literal["writes", "block", "attention", "mlp"] = "writes",
        alpha: float = 1.0,
        positions: str = "all",
        **options: Unpack[ReadingOptions],
    ) -> None:
        if sites not in ("writes", "block", "attention", "mlp"):
            raise ValueError(f"sites must be writes, block, attention or mlp, got {sites!r}.")
        layers = None if layer is None else [layer]
        super().__init__("block", layers, alpha, positions, **options)
        self.where: Literal["writes", "block", "attention", "mlp"] = sites

    def find_sites(self, backbone: nn.Module) -> Sequence[LayerSite]:
        sites = super().find_sites(backbone)
        if self.where == "writes":
            self.targets = [replace(sites[0], name=name) for name in stream_writers(backbone, self.within)]
        else:
            self.targets = layer_sites(backbone, self.where, within=self.within)
        return sites

    def vectors(self, activations: Tensor, label: Tensor, group: Tensor) -> Tensor:
        return ablation_direction(activations, label)
