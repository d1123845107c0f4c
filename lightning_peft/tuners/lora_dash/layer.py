"""The wrapper around one linear layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_peft.tuners.linear_wrapper import MatrixChangeLayer
from lightning_peft.tuners.lora_dash.config import TENSORS, LoRADashConfig


class LoRADashLayer(MatrixChangeLayer):
    """Add `lora_scale B A x + U diag(c) Vᵀ x` to a linear layer's output.

    U and V are zero until `choose_directions`, so that until then c has a gradient of zero and stays zero: it is in
    the optimizer from the beginning. They are saved with the adapter, whose folder then needs no decomposition.
    """

    adapter_layer_names = ("dash_A", "dash_B", "dash_coefficients")
    other_param_names = ("dash_inputs", "dash_outputs", "scaling", "configs", "dropout")
    config_name = "LoRADashConfig"

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoRADashConfig, key: str) -> None:
        super().__init__(base_layer, "LoRADash", key)
        self.dash_A, self.dash_B, self.dash_coefficients = (nn.ParameterDict({}) for _ in range(3))
        self.dash_inputs, self.dash_outputs = (BufferDict(persistent=True) for _ in range(2))
        self.configs: dict[str, LoRADashConfig] = {}
        self.dropout = nn.ModuleDict({})
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: LoRADashConfig) -> None:
        """Give the layer one more adapter, A random and all else zero."""
        inputs, outputs = self.in_features, self.out_features
        count = min(config.directions, inputs, outputs)
        a = torch.empty(config.r, inputs)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as LoRA
        self.dash_A[adapter_name] = nn.Parameter(a)
        self.dash_B[adapter_name] = nn.Parameter(torch.zeros(outputs, config.r))
        self.dash_coefficients[adapter_name] = nn.Parameter(torch.zeros(count))
        self.dash_inputs[adapter_name] = torch.zeros(count, inputs)
        self.dash_outputs[adapter_name] = torch.zeros(outputs, count)
        self.configs[adapter_name] = config
        self.dropout[adapter_name] = nn.Dropout(config.dropout)
        self.scaling[adapter_name] = config.alpha
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        acting = self.acting()
        y = self.base_layer(x, *args, **kwargs)
        dtype = y.dtype
        for name in acting:
            down, up = self.factors(name, self.scaling[name])
            y = y + linear(linear(self.dropout[name](x).to(down.dtype), down), up)
        return y.to(dtype)

    def factors(self, adapter_name: str, scale: float) -> tuple[Tensor, Tensor]:
        """Return an adapter's change as a product of two matrices, see `LoRADashConfig.factors`."""
        held = {kind: getattr(self, kind)[adapter_name] for kind in TENSORS}
        return self.configs[adapter_name].factors(held, scale)

    def change(self, adapter_name: str) -> Tensor:
        down, up = self.factors(adapter_name, 1.0)
        return up @ down

    def __repr__(self) -> str:
        return "lora_dash." + super().__repr__()
