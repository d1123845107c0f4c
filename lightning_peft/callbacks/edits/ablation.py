"""Directional ablation as one callback."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Unpack

from torch import Tensor, nn

from lightning_peft.backbone.layers import LayerSite, layer_sites, stream_writers
from lightning_peft.editing.contrast import ablation_direction
from lightning_peft.fitting.adapter_callback import EditOptions
from lightning_peft.fitting.edit_layers import StatementLayers

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig  # as in lora.py


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
        **options: Unpack[EditOptions],
    ) -> None:
        if sites not in ("writes", "block", "attention", "mlp"):
            raise ValueError(f"sites must be writes, block, attention or mlp, got {sites!r}.")
        layers = None if layer is None else [layer]
        super().__init__("block", layers, alpha, positions, **options)
        self.where = sites

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        super().make_config(backbone)
        if self.where == "writes":
            one = self._read[0]
            assert isinstance(one, LayerSite)
            targets = [replace(one, name=name) for name in stream_writers(backbone)]
        else:
            targets = layer_sites(backbone, self.where)  # type: ignore[arg-type]
        self._targets = [site.name for site in targets]
        return self.config_of(targets)

    def vectors(self, activations: Tensor, truth: Tensor, question_id: Tensor) -> Tensor:
        return ablation_direction(activations, truth)
