"""Head offsets trained from zero (the second step of LoFiT) as one callback."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from torch import nn

from lightning_peft.callbacks.peft import PEFT
from lightning_peft.tuners.structure import blocks

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.tuners.configs import PeftConfig


class HeadOffsets(PEFT):
    """Train a vector for each attention head, added to the head's output: `z_h + alpha * offset_h`, zero at the start.

    The second step of LoFiT (Yin et al. 2024, arXiv:2406.01563); what ITI computes, trained. Trainable parameters:
    `heads * head_dim`.

    Args:
        heads: `(layer, head)` pairs, both 0-based; default every head. Layers are counted over all attentions.
        alpha: the strength.
        positions: `"all"` tokens, where the offset is a bias and can be merged; only those from the `"answer"`'s
            beginning on; or only `"generated"` ones.
        pattern: a regular expression for the end of the names of the attention's output projections. Default: the
            last matrix of each attention in the backbone's blocks.
        num_heads: for models without a configuration, how many heads enter each of them.
        backbone: see `PEFT`.
        name: the adapter's name.
        backbone_dropout: see `PEFT`.
        gradient_checkpointing: see `PEFT`.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import HeadOffsets
        >>> trainer = L.Trainer(callbacks=[HeadOffsets(heads=[(3, 0), (3, 2)])], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    def __init__(
        self,
        heads: list[tuple[int, int]] | None = None,
        alpha: float = 1.0,
        positions: Literal["all", "answer", "generated"] = "all",
        pattern: str | None = None,
        num_heads: int | None = None,
        backbone: str | None = None,
        name: str = "head_offsets",
        backbone_dropout: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        if positions not in ("all", "answer", "generated"):
            raise ValueError(f'positions must be "all", "answer" or "generated", got {positions!r}.')
        if heads is not None and (not heads or any(len(pair) != 2 for pair in heads)):
            raise ValueError(f"heads must be pairs of a layer and a head, got {heads}.")
        super().__init__(None, backbone, name, backbone_dropout, gradient_checkpointing)  # type: ignore[arg-type]
        self.heads, self.alpha, self.positions = heads, alpha, positions
        self.pattern, self.num_heads = pattern, num_heads
        if positions != "all":
            self.lacks = {"merge": "a bias acts at every position"}  # type: ignore[misc]

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.editing.heads import head_offsets_config, head_sites

        if self.positions != "all" and getattr(getattr(backbone, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"Where an answer begins is not known in an encoder-decoder such as {type(backbone).__name__}: use "
                'positions="all".'
            )
        sites = head_sites(backbone, self.pattern or _projections(backbone), self.num_heads)
        heads = None if self.heads is None else [(int(layer), int(head)) for layer, head in self.heads]
        for layer, head in heads or ():
            if not (0 <= layer < len(sites) and 0 <= head < sites[layer].num_heads):
                raise ValueError(
                    f"There is no head {head} in layer {layer}: the model has {len(sites)} layers of "
                    f"{sites[0].num_heads} heads."
                )
        return head_offsets_config(sites, heads, self.alpha, self.positions)


def _projections(backbone: nn.Module) -> str | None:
    """A pattern for the last matrices of all attentions, or None where the blocks' structure does not show any."""
    names = [span.last for block in blocks(backbone) for span in block.attention]
    return "|".join(re.escape(name) for name in names) or None
