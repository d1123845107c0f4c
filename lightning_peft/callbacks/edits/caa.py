"""Contrastive activation addition as one callback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from lightning_peft.editing.contrast import caa_vectors
from lightning_peft.fitting.edit_layers import StatementLayers
from lightning_peft.fitting.reading_edit import ReadingOptions, Tokenizer, edit
from lightning_peft.stack.adapter import Adapter


class CAA(StatementLayers):
    """Contrastive activation addition (Rimsky et al. 2023, arXiv:2312.06681): add the mean difference of pairs.

    `trainer.fit` reads the residual stream at the last token of labelled statements and installs a layer-offsets
    adapter that adds `multiplier` times the mean difference between true and false statements of the same question.
    Nothing is trained. The training batches are as `ITI`'s.

    Args:
        layers: which blocks, by number from 0, or a window such as `"10:14"`; default the middle one.
        multiplier: the strength; negative leads the other way.
        positions: `"answer"` (from the last prompt token on), `"generated"`, `"prompt"`, `"all"`, or a window of one of
            them; see `lightning_peft.tokens`.
        sites: whose output is read and moved: `"block"` (the paper's), `"attention"` or `"mlp"`.
        gate: None; `"adaptive"`: the strength at each token is `multiplier * (1 - p + beta)`, p being a probe's
            probability that what it sees there is true; or `"conditional"`: it acts only where `1 - p` is above
            `threshold`. See `lightning_peft.stack.gates`.
        beta: of an adaptive gate.
        threshold: of a conditional one.
        C: inverse strength of the L2 penalty of a gate's probes.

    Attributes:
        edit_: the computed `LayerEdit` after `fit`.

    Raises:
        ValueError: in one sentence: no labels in the batch, one class only, no such layer, activations that are not
            finite.
        RuntimeError: fit ended before the pass did, so that nothing was computed.
    """

    default_name = "caa"

    def __init__(
        self,
        layers: list[int] | str | None = None,
        multiplier: float = 1.0,
        positions: str = "answer",
        sites: Literal["block", "attention", "mlp"] = "block",
        gate: Literal["adaptive", "conditional"] | None = None,
        beta: float = 0.0,
        threshold: float = 0.5,
        C: float = 1.0,
        **options: Unpack[ReadingOptions],
    ) -> None:
        super().__init__(sites, layers, multiplier, positions, gate, beta, threshold, C, **options)

    def vectors(self, activations: Tensor, label: Tensor, group: Tensor) -> Tensor:
        return caa_vectors(activations, label, group)


def edit_caa(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    label: Sequence[int] | Tensor,
    group: Sequence[int] | Tensor,
    **options: Any,
) -> Adapter:
    """Compute a contrastive activation addition from labelled texts and put it on a model, without a Trainer.

    Args:
        model, tokenizer, texts, label, group: as `lightning_peft.edit`.
        **options: those of `CAA`.

    Returns:
        The adapter, on the model.

    Raises:
        ValueError: as `CAA`.
    """
    return edit(model, tokenizer, texts, label, group, CAA(**options))
