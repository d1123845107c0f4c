"""The wrapper around one linear layer."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from lightning_peft.backbone.modules import is_linear
from lightning_peft.backbone.quantization import check_merge
from lightning_peft.backbone.structure import matrix_shape
from lightning_peft.tuners.ssb.config import SSBConfig
from lightning_peft.tuners.tuner import TunerLayer


class SSBLayer(nn.Module, TunerLayer):
    """Scale a linear layer's input by v and its weight's output by u: `u ⊙ W (v ⊙ x) + b`.

    The weight itself is not read, so that it may be quantised, or wrapped by another adapter.
    """

    adapter_layer_names = ("ssb_in", "ssb_out")
    other_param_names = ("scaling",)
    acts_alone = True  # it needs to know nothing but its input

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SSBConfig, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        if not is_linear(base):
            raise ValueError(f"{name} is a {type(base).__name__}, but SSB scales linear layers.")
        self.in_features, self.out_features = matrix_shape(base)
        self.ssb_in = nn.ParameterDict({})
        self.ssb_out = nn.ParameterDict({})
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._weight_before_merge: nn.Parameter | None = None
        self._active_adapter = adapter_name
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
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters else [a for a in self.active_adapters if a not in self.merged_adapters]
        v, u = self._scale(self.ssb_in, active), self._scale(self.ssb_out, active)
        y = self.base_layer(x if v is None else (x * v).to(x.dtype), *args, **kwargs)
        if u is None:
            return y
        bias = self._bias(x)
        if bias is None:
            return (y * u).to(y.dtype)
        # u (y - b) + b, in a form that is y itself where u is one
        return torch.addcmul(bias - bias * u, y.to(u.dtype), u).to(y.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Give the layer the weight `diag(u) W diag(v)`; its own is kept for `unmerge`. Adapters inside come first."""
        check_merge([self], "SSBConfig")
        base: Any = self.get_base_layer()
        for name in [n for n in check_adapters_to_merge(self, adapter_names) if n in self.scaling]:
            v, u = self._scale(self.ssb_in, [name]), self._scale(self.ssb_out, [name])
            turned = not isinstance(base, nn.Linear)  # Conv1D's weight is [inputs, outputs]
            with torch.no_grad():
                weight = base.weight.detach()
                for vector, by_rows in ((v, turned), (u, not turned)):
                    if vector is not None:
                        weight = weight * (vector[:, None] if by_rows else vector)
            if safe_merge and not torch.isfinite(weight).all():
                # peft's words, by which callers know it
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken: it would put NaN or "
                    "infinity into them."
                )
            if self._weight_before_merge is None:
                self._weight_before_merge = base.weight
            # not in place: another module may share the weight
            base.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the layer's own weight back, bit for bit."""
        if self._weight_before_merge is not None:
            base: Any = self.get_base_layer()
            weight, self._weight_before_merge = self._weight_before_merge, None
            weight.data = weight.data.to(base.weight.device)
            base.weight = weight
        self.merged_adapters.clear()

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
