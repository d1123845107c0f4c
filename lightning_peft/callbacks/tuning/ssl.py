"""SSL as one callback."""

from __future__ import annotations

from typing import Unpack

from lightning_peft.backbone.targets import Layers, Within
from lightning_peft.callbacks.tuning.ssb import SSB
from lightning_peft.fitting.adapter_callback import AdapterOptions


class SSL(SSB):
    """Scale each weight from the side of its input by a learned vector: `y = W (v ⊙ x) + b`, v ones at the start.

    Si, Yang and Shen 2024, arXiv:2407.05417, as in their code; IA3 with every adapted module taken as a feed-forward
    one computes the same. Trainable parameters: `inputs` for each adapted matrix.

    Args:
        target_modules: see `SSB`.
        layers: see `SSB`.
        within: see `SSB`.
        **options: see `AdapterOptions`.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import SSL
        >>> trainer = L.Trainer(callbacks=[SSL(within="mlp")], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "ssl"

    sides = "input"

    def __init__(
        self,
        target_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        within: Within | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        super().__init__(target_modules, layers, within, **options)
