"""Layer offsets trained from zero as one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Unpack

from torch import nn

from lightning_peft.backbone import counts
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig  # as in lora.py


class LayerOffsets(AdapterCallback):
    """Train a vector for each block, attention or feed-forward part, added to its output: `x + alpha * v`.

    What CAA computes, trained from zero. Trainable parameters: the width of the residual stream for each site.

    Args:
        sites: whose output is moved: `"block"`, `"attention"` or `"mlp"`.
        layers: which, by number from 0, or a window such as `"8:16"`; default all.
        alpha: the strength.
        positions: `"all"` tokens, where the offset can be merged (of blocks, where nothing follows the residual sum);
            only those from the `"answer"`'s beginning on; or only `"generated"` ones.
        within: the part of the model whose layers are meant, see `lightning_peft.backbone.language_model`; default the
            language model.
        **options: see `AdapterOptions`.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import LayerOffsets
        >>> trainer = L.Trainer(callbacks=[LayerOffsets(layers="8:16")], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "layer_offsets"
    law_examples: Mapping[str, LawExample] = {
        "LayerOffsets": LawExample({}, ("attention", "transformers", "mlp", "decoder")),
        "LayerOffsets of feed-forward parts": LawExample({"sites": "mlp"}, ("mlp",)),
        "LayerOffsets of answers": LawExample({"positions": "answer"}, ("attention", "transformers", "position_ids")),
    }

    def __init__(
        self,
        sites: Literal["block", "attention", "mlp"] = "block",
        layers: list[int] | str | None = None,
        alpha: float = 1.0,
        positions: Literal["all", "answer", "generated"] = "all",
        within: str | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if positions not in ("all", "answer", "generated"):
            raise ValueError(f'positions must be "all", "answer" or "generated", got {positions!r}.')
        super().__init__(**options)
        self.sites, self.layers, self.alpha, self.positions, self.within = sites, layers, alpha, positions, within
        if positions != "all":
            self.exempt = {"merge": "a bias acts at every position"}

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.editing.layers import layer_offsets_config
        from lightning_peft.editing.selection import Selection

        if self.positions != "all" and getattr(getattr(backbone, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"Where an answer begins is not known in an encoder-decoder such as {type(backbone).__name__}: use "
                'positions="all".'
            )
        layers = tuple(self.layers) if isinstance(self.layers, list) else self.layers
        sites = Selection(sites=self.sites, layers=layers, within=self.within).find(backbone)
        return layer_offsets_config(sites, self.alpha, self.positions)  # type: ignore[arg-type]

    def trainable_parameters(self, backbone: nn.Module) -> int:
        return sum(outputs for _, outputs in counts.parts(backbone))
