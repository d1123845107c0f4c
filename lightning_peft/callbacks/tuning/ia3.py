"""IA3 as one callback."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn

from lightning_peft.backbone.defaults import every_matrix, known_targets, takes_adapters
from lightning_peft.backbone.modules import base_modules
from lightning_peft.backbone.structure import blocks, matrix_shape
from lightning_peft.backbone.targets import Layers, choose_targets, matching
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig


class IA3(AdapterCallback):
    """IA3: keys, values and the feed-forward part's inner activations are each multiplied by a trained vector.

    Liu et al. 2022, arXiv:2205.05638. Trainable parameters: the outputs of each adapted matrix, the inputs of each
    feed-forward one. All ones at the start; merged, it costs nothing.

    Args:
        target_modules: names of the modules to adapt (or ends of names, or a regular expression), feed-forward ones
            included. Default: peft's choice for the model's type; else by structure the keys and values of each
            attention (where they are one matrix with the queries, that one) and each block's last feed-forward matrix
            (experts that are fused into parameters have none, which a warning says); without attention, every linear
            layer.
        feedforward_modules: those among them whose inputs, not outputs, are multiplied; default likewise.
        layers: which blocks: numbers (0-based), or a rule such as `Layers(last=4)`; default all.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: feed-forward modules without target modules; at `setup`, one that is no target.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import IA3
        >>> trainer = L.Trainer(callbacks=[IA3()], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    default_name = "ia3"
    law_examples: Mapping[str, LawExample] = {"IA3": LawExample(), "IA3 in 4 bits": LawExample(four_bits=True)}

    def __init__(
        self,
        target_modules: list[str] | str | None = None,
        feedforward_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if feedforward_modules is not None and target_modules is None:
            raise ValueError("feedforward_modules are some of the target_modules: name those too.")
        super().__init__(**options)
        self.target_modules, self.feedforward_modules, self.layers = target_modules, feedforward_modules, layers

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from peft import IA3Config

        targets, feedforward = self.target_modules, self.feedforward_modules or []
        if targets is None:
            targets, feedforward = _default(backbone)
        chosen = choose_targets(backbone, targets, self.layers)
        (unknown, adapted), (strange, inside) = matching(backbone, chosen), matching(backbone, feedforward)
        strange += [] if self.layers else sorted(set(inside) - set(adapted))
        if strange:
            raise ValueError(f"feedforward_modules has {strange[0]!r}, which is not among the target_modules.")
        # full names, since peft wants the ones to be some of the others as they are written
        return IA3Config(
            target_modules=adapted + unknown, feedforward_modules=[name for name in inside if name in set(adapted)]
        )

    def trainable_parameters(self, backbone: nn.Module) -> int:
        config: Any = self.make_config(backbone)
        modules = {name: matrix_shape(backbone.get_submodule(name)) for name in config.target_modules}
        return sum(shape[name not in config.feedforward_modules] for name, shape in modules.items())


def _default(backbone: nn.Module) -> tuple[list[str], list[str]]:
    """Return the target modules, and those of them that are feed-forward."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

    all_blocks = blocks(backbone)
    if fused := [name for block in all_blocks for name in block.experts]:
        warnings.warn(
            f"IA3 leaves the experts of {type(backbone).__name__} alone, which are fused into {len(fused)} parameters "
            f"such as {fused[0]}: it multiplies what modules take or give.",
            stacklevel=2,
        )
    known, inner = known_targets(backbone, TARGETS), known_targets(backbone, FEEDFORWARD)
    if isinstance(known, list) and not isinstance(inner, str):
        return known, inner or []
    # registered in the order query, key, value, output wherever they are apart
    named = dict(base_modules(backbone))
    spans = [[n for n in span.matrices if takes_adapters(named[n])] for block in all_blocks for span in block.attention]
    attention = [name for matrices in spans for name in (matrices[1:3] if len(matrices) > 2 else matrices[:1])]
    feedforward = [block.mlp.last for block in all_blocks if block.mlp and takes_adapters(named[block.mlp.last])]
    return (attention + feedforward, feedforward) if attention else (every_matrix(backbone), [])
