"""LoRA-Dash as one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

from torch import nn

from lightning_peft.backbone import counts
from lightning_peft.backbone.linear_layers import linear_layers
from lightning_peft.backbone.targets import Layers, Within, choose_targets
from lightning_peft.fitting.adapter_callback import AdapterOptions
from lightning_peft.fitting.law_example import LawExample
from lightning_peft.fitting.multi_phase import MultiPhase

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.configs import PeftConfig
    from lightning_peft.tuners.lora_dash import LoRADashLayer


class LoRADash(MultiPhase):
    """LoRA, and after a warm-up the singular directions of each weight that it has changed most for their size.

    Si et al. 2024, arXiv:2409.01035: `y = W x + (alpha / r) B A x + U diag(c) Vᵀ x`. After `warmup_steps` U and V are
    the singular vectors of W with the highest change rate `|u_iᵀ ΔW v_i| / σ_i`, `ΔW = (alpha / r) B A`; A, B and the
    coefficients c are then trained together. c is zero until there are directions, so that the switch changes no
    output. Trainable parameters: `r * (inputs + outputs) + min(directions, inputs, outputs)` for each adapted matrix.

    Args:
        r: the rank.
        alpha: the scaling of B A is `alpha / r`.
        directions: how many directions of each weight.
        warmup_steps: optimizer steps before the directions are chosen; fewer than the training has.
        dropout: dropout on the input of what is added, in training.
        target_modules: names of the modules to adapt (or suffixes; a string is a regular expression). Default: every
            linear layer of the backbone's blocks, or of the backbone where it has no blocks.
        layers: which blocks to adapt: numbers (0-based), or a rule such as `Layers(last=4)`; default all.
        within: adapt only modules in `"attention"`, or only those in the `"mlp"`.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: at once for wrong arguments; when training starts, if it would end before the switch.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import LoRADash
        >>> trainer = L.Trainer(callbacks=[LoRADash(r=8)], max_steps=500, accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "dash"
    law_examples: Mapping[str, LawExample] = {
        # few directions beside the rank: a folder holds them, and they are not trained
        "LoRADash": LawExample({"r": 4, "alpha": 8, "directions": 1, "warmup_steps": 1})
    }

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16,
        directions: int = 8,
        warmup_steps: int = 100,
        dropout: float = 0.0,
        target_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        within: Within | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if min(r, directions, warmup_steps) < 1:
            raise ValueError(
                f"r, directions and warmup_steps must be at least 1, got {r}, {directions} and {warmup_steps}."
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        super().__init__(**options)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.directions, self.warmup_steps = directions, warmup_steps
        self.target_modules, self.layers, self.within = target_modules, layers, within
        self.steps, self.turn = [], 0

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.lora_dash import LoRADashConfig

        targets = linear_layers(backbone) if self.target_modules is None else self.target_modules
        return LoRADashConfig(
            target_modules=choose_targets(backbone, targets, self.layers, self.within),
            r=self.r,
            lora_scale=self.alpha / self.r,
            directions=self.directions,
            dropout=self.dropout,
        )

    def trainable_parameters(self, backbone: nn.Module) -> int:
        return sum(self.r * (i + o) + min(self.directions, i, o) for i, o in counts.linear(backbone))

    def plan(self, total: float, epoch: float) -> list[int]:
        return [self.warmup_steps]

    def change(self, turn: int) -> bool:
        from lightning_peft.tuners.lora_dash.directions import choose_directions

        assert self.stack is not None
        choose_directions(self.stack.backbone, self.name)
        return False  # coefficients had no gradient until now, and A and B go on as they were

    def flattened(self) -> bool:
        return any(layer.dash_A[self.name].dim() != 2 for layer in self._layers())

    def has_chosen(self) -> bool:
        return any(bool(layer.dash_outputs[self.name].any()) for layer in self._layers())

    def _layers(self) -> list[LoRADashLayer]:
        assert self.stack is not None
        return list(self.stack[self.name].injection.layers())
