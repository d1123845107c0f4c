"""The configuration of a LoRA-Dash adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from peft.config import PeftConfig
from torch import Tensor

from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.registration import add_peft_type
from lightning_peft.tuners.config import WithCard
from lightning_peft.tuners.targets import order_targets

TENSORS = ("dash_A", "dash_B", "dash_coefficients", "dash_inputs", "dash_outputs")


@dataclass
class LoRADashConfig(WithCard, PeftConfig):
    """A low-rank change and some singular directions of the weight: `W x + lora_scale B A x + U diag(c) Vᵀ x`.

    Si et al. 2024, arXiv:2409.01035. B, c, U and V are zero at the start; U `[outputs, directions]` and V
    `[inputs, directions]` are chosen by `choose_directions` after a warm-up and are not trained. Trained parameters:
    `r * (inputs + outputs) + min(directions, inputs, outputs)` for each layer.

    Args:
        target_modules: the linear layers, by name or suffix; a string is a regular expression, or `"all-linear"`.
            Default: those of the model's blocks.
        r: the rank of B A.
        lora_scale: the factor of B A, LoRA's `alpha / r`.
        directions: how many singular directions; no more than a layer has.
        dropout: of the inputs, in training.
        alpha: the dial: a factor of all that is added.
        exclude_modules: names left out of `target_modules`.
        modules_to_save: other modules to train and save whole, as in every peft method.
        layers_to_transform: the numbers of the blocks in which `target_modules`, given by suffixes, are adapted.
        layers_pattern: the name of the list of blocks, where it is not the first in a module's name.
    """

    target_modules: list[str] | str | None = field(default=None)
    r: int = field(default=8)
    lora_scale: float = field(default=2.0)
    directions: int = field(default=8)
    dropout: float = field(default=0.0)
    alpha: float = field(default=1.0)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("LORA_DASH")
        order_targets(self)
        if self.r < 1 or self.directions < 1:
            raise ValueError(f"r and directions must be at least 1, got {self.r} and {self.directions}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}.")

    def lora_factors(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the same change as plain LoRA factors: `{module: (A [r + directions, inputs], B [outputs, …])}`.

        Args:
            tensors: those of a saved folder, by its keys.

        Raises:
            AdapterError: the folder holds more than LoRA can, such as a head that was trained whole.
        """
        layers: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            module, _, kind = key.rpartition(".")
            if kind not in TENSORS:
                raise AdapterError(f"{key} is no tensor of LoRA-Dash, and no LoRA can hold it: save it apart.")
            layers.setdefault(module, {})[kind] = tensor.float()
        return {module: self.factors(held, self.alpha) for module, held in layers.items()}

    def factors(self, held: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
        """Return A' `[r + directions, inputs]` and B' `[outputs, r + directions]` whose product is the whole change.

        Args:
            held: one layer's tensors: `dash_A` `[r, inputs]`, `dash_B` `[outputs, r]`, `dash_coefficients`
                `[directions]`, `dash_inputs` (Vᵀ) `[directions, inputs]`, `dash_outputs` (U) `[outputs, directions]`.
            scale: the dial.
        """
        a, b, coefficients, inputs, outputs = (held[kind] for kind in TENSORS)
        down = torch.cat([a, inputs.to(a.dtype)])
        up = torch.cat([self.lora_scale * b, outputs.to(b.dtype) * coefficients.to(b.dtype)], dim=1)
        return down, up if scale == 1.0 else scale * up
