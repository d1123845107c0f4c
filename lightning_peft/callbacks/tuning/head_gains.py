"""One trained strength for each head, along directions that stay as they were computed, as one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Unpack

import torch
from torch import nn

from lightning_peft.backbone.heads import head_sites
from lightning_peft.backbone.sharded import write
from lightning_peft.callbacks.tuning.head_offsets import check_heads, head_config, read_edit
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.adapter import Adapter
    from lightning_peft.stack.configs import PeftConfig
    from lightning_peft.stack.stack import AdapterStack

_GAIN, _DIRECTION = ".head_offsets", ".head_offsets_directions"


class HeadGains(AdapterCallback):
    """Train how far each head of an edit goes: `z_h + gain_h * offset_h` with the offsets of a saved ITI edit frozen.

    ITI gives all heads one strength alpha, in standard deviations (Li et al. 2023, arXiv:2306.03341); here each head's
    own is learnt, and heads, directions and spreads stay. The gains start at 1, which is the edit. Trainable
    parameters: one a head. Between the edit and `HeadOffsets(init_from=…)`, which trains the directions too.

    Args:
        init_from: a folder with head offsets, such as ITI saves; its heads, positions and strength are taken. Without
            it, a control: random unit directions, whose gains start at 0.
        heads: of the control, `(layer, head)` pairs, both 0-based; default every head.
        positions: of the control, see `HeadOffsets`.
        seed: of the random directions.
        pattern: of the control, see `HeadOffsets`.
        num_heads: for models without a configuration, how many heads enter each projection.
        within: see `HeadOffsets`.
        **options: see `AdapterOptions`.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import HeadGains
        >>> trainer = L.Trainer(callbacks=[HeadGains(init_from="runs/iti")], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "head_gains"
    law_examples: Mapping[str, LawExample] = {"HeadGains": LawExample({}, ("attention", "transformers"))}

    def __init__(
        self,
        init_from: str | None = None,
        heads: list[tuple[int, int]] | None = None,
        positions: Literal["all", "answer", "generated"] = "all",
        seed: int = 0,
        pattern: str | None = None,
        num_heads: int | None = None,
        within: str | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        check_heads(heads, positions, init_from)
        super().__init__(**options)
        self.init_from, self.heads, self.positions, self.seed = init_from, heads, positions, seed
        self.pattern, self.num_heads, self.within = pattern, num_heads, within

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        if self.init_from is not None:
            config = read_edit(self.init_from)[0]
        else:
            config = head_config(backbone, self.heads, 1.0, self.positions, self.pattern, self.num_heads, self.within)
        config.parameters = "gains"
        return config

    def trainable_parameters(self, backbone: nn.Module) -> int:
        return sum(site.num_heads for site in head_sites(backbone, within=self.within))

    def _place(self, stack: AdapterStack, name: str, config: PeftConfig) -> Adapter:
        new = name not in stack
        part = super()._place(stack, name, config)
        if new and self.init_from is not None:
            _, tensors, fingerprint = read_edit(self.init_from)
            stack.check_base(fingerprint, self.init_from)
            offsets = {key: value for key, value in tensors.items() if key.endswith(_GAIN)}
            directions = {key.removesuffix(_GAIN) + _DIRECTION: value for key, value in offsets.items()}
            gains = {key: torch.ones(len(value), 1) for key, value in offsets.items()}
            stack.load_tensors(part, tensors | directions | gains, self.init_from)
        elif new:
            generator, tensors = torch.Generator().manual_seed(self.seed), stack.live(part)
            for key, live in sorted(stack.keys(part).items()):
                if key.endswith(_DIRECTION):
                    drawn = torch.randn(tensors[live].shape, generator=generator)
                    write(tensors[live], drawn / drawn.norm(dim=1, keepdim=True))
        return part
