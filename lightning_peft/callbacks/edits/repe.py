"""Representation engineering's control by reading vectors as one callback."""

from __future__ import annotations

from typing import Literal, Unpack

from torch import Tensor

from lightning_peft.editing.contrast import repe_vectors
from lightning_peft.fitting.edit_layers import StatementLayers
from lightning_peft.fitting.reading_edit import ReadingOptions


class RepE(StatementLayers):
    """Representation engineering (Zou et al. 2023, arXiv:2310.01405): add the principal component of pair differences.

    As `CAA`, with another vector: in each layer the first principal component of the differences between a true and a
    false statement of each question, turned towards the true ones.

    Args:
        layers: which blocks; default the middle third, since the paper moves a range of layers.
        coeff: the strength, in standard deviations of the activations along the component (the paper's component has
            length 1, and its coefficient is searched for each model).
        seed: which pair of statements stands for each question.
        positions, sites, gate, beta, threshold, C: as `CAA`'s.

    Attributes:
        edit_: the computed `LayerEdit` after `fit`.

    Raises:
        ValueError: in one sentence, as `CAA`, or fewer than two pairs.
        RuntimeError: fit ended before the pass did, so that nothing was computed.
    """

    default_name = "repe"

    def __init__(
        self,
        layers: list[int] | str | None = None,
        coeff: float = 1.0,
        positions: str = "answer",
        sites: Literal["block", "attention", "mlp"] = "block",
        seed: int = 0,
        gate: Literal["adaptive", "conditional"] | None = None,
        beta: float = 0.0,
        threshold: float = 0.5,
        C: float = 1.0,
        **options: Unpack[ReadingOptions],
    ) -> None:
        super().__init__(sites, layers, coeff, positions, gate, beta, threshold, C, **options)
        self.seed = seed

    def default_layers(self, count: int) -> str:
        return f"{count // 3}:{max(2 * count // 3, count // 3 + 1)}"

    def vectors(self, activations: Tensor, label: Tensor, group: Tensor) -> Tensor:
        return repe_vectors(activations, label, group, self.seed)
