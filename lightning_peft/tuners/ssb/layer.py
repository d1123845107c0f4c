"""The wrapper around one linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.tuners.linear_wrapper import LinearWrapper
from lightning_peft.tuners.ssb.config import SSBConfig


class SSBLayer(LinearWrapper):
    """Scale a linear layer's input by v and its weight's output by u: `u ⊙ W (v ⊙ x) + b`.

    The weight itself is not read, so that it may be quantised, or wrapped by another adapter.
    """

    adapter_layer_names = ("ssb_in", "ssb_out")
    other_param_names = ("scaling",)
    config_name = "SSBConfig"
    acts_alone = True  # it needs to know nothing but its input

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SSBConfig, name: str) -> None:
        super().__init__(base_layer, "SSB scales", name)
        self.ssb_in = nn.ParameterDict({})
        self.ssb_out = nn.ParameterDict({})
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SSBConfig) -> None:
        """Give the layer vectors of ones for one more adapter."""
        sides = {
            "both": ((self.ssb_in, self.in_features), (self.ssb_out, self.out_features)),
            "input": ((self.ssb_in, self.in_features),),
            "output": ((self.ssb_out, self.out_features),),
        }
        for vectors, size in sides[config.sides]:
            vectors[adapter_name] = nn.Parameter(torch.ones(size))
        self.scaling[adapter_name] = config.alpha
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = self.acting()
        v, u = self._scale(self.ssb_in, active), self._scale(self.ssb_out, active)
        y = self.base_layer(x if v is None else (x * v).to(x.dtype), *args, **kwargs)
        if u is None:
            return y
        bias = self._bias(x)
        if bias is None:
            return (y * u).to(y.dtype)
        # u (y - b) + b, in a form that is y itself where u is one
        return torch.addcmul(bias - bias * u, y.to(u.dtype), u).to(y.dtype)

    def merged_weight(self, adapter_name: str, weight: Tensor) -> Tensor:
        v, u = self._scale(self.ssb_in, [adapter_name]), self._scale(self.ssb_out, [adapter_name])
        weight = weight if v is None else weight * v
        return weight if u is None else weight * u[:, None]

    def _scale(self, vectors: nn.ParameterDict, adapters: list[str]) -> Tensor | None:
        """Return the product of some adapters' vectors at their strength; None where nothing is scaled."""
        product: Tensor | None = None
        for name in adapters:
            strength = self.scaling.get(name, 0.0)
            if name in vectors and strength != 0:
                vector = vectors[name] if strength == 1 else 1 + strength * (vectors[name] - 1)
                product = vector if product is None else product * vector
        return product

    def _bias(self, x: Tensor) -> Tensor | None:
        """Return the layer's output for an input of zeros, which u does not scale."""
        base: Any = self.get_base_layer()
        if self.base_layer is base or base.bias is None:
            return base.bias
        return self.base_layer(x.new_zeros((*[1] * (x.dim() - 1), x.shape[-1]))).flatten()

    def __repr__(self) -> str:
        return "ssb." + super().__repr__()
