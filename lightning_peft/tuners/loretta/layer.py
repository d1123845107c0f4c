"""The wrapper around one linear layer."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from lightning_peft.backbone.modules import is_linear
from lightning_peft.backbone.quantization import check_merge
from lightning_peft.backbone.structure import matrix_shape
from lightning_peft.tuners.loretta.config import LoRETTAConfig
from lightning_peft.tuners.tensor_train import TensorTrain
from lightning_peft.tuners.tuner import TunerLayer, check_merged


class LoRETTALayer(nn.Module, TunerLayer):
    """Add `alpha/r * B A x` to a linear layer's output, A and B tensor trains that are never multiplied out whole.

    The weight itself is not read, so that it may be quantised, or wrapped by another adapter.
    """

    adapter_layer_names = ("loretta_A", "loretta_B")
    other_param_names = ("scaling", "loretta_dropout")
    acts_alone = True  # it needs to know nothing but its input

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoRETTAConfig, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        if not is_linear(base):
            raise ValueError(f"{name} is a {type(base).__name__}, but LoRETTA adapts linear layers.")
        self.in_features, self.out_features = matrix_shape(base)
        self.loretta_A = nn.ModuleDict({})
        self.loretta_B = nn.ModuleDict({})
        self.loretta_dropout = nn.ModuleDict({})
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._weight_before_merge: nn.Parameter | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: LoRETTAConfig) -> None:
        """Give the layer the trains of one more adapter, with B zero."""
        self.loretta_A[adapter_name] = TensorTrain(self.in_features, config.r, config.tensor_rank)
        self.loretta_B[adapter_name] = b = TensorTrain(config.r, self.out_features, config.tensor_rank)
        b.zero()
        self.loretta_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.scaling[adapter_name] = config.scaling
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def trains(self, adapter_name: str) -> tuple[TensorTrain, TensorTrain]:
        """Return an adapter's A and B."""
        a, b = self.loretta_A[adapter_name], self.loretta_B[adapter_name]
        assert isinstance(a, TensorTrain) and isinstance(b, TensorTrain)
        return a, b

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return what an adapter adds to the weight, `[outputs, inputs]`."""
        a, b = self.trains(adapter_name)
        return self.scaling[adapter_name] * (b.matrix() @ a.matrix())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            # at strength 0 the base stays as it is, bit for bit
            if name in self.merged_adapters or not self.scaling.get(name):
                continue
            a, b = self.trains(name)
            change = b(a(self.loretta_dropout[name](x.to(a.cores[0].dtype))))
            y = y + (self.scaling[name] * change).to(y.dtype)
        return y

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Give the layer the weight `W + alpha/r B A`; its own is kept for `unmerge`."""
        check_merge([self], "LoRETTAConfig")
        base: Any = self.get_base_layer()
        for name in [n for n in check_adapters_to_merge(self, adapter_names) if n in self.scaling]:
            weight = base.weight.detach()
            change = self.get_delta_weight(name).to(weight.device)
            merged = weight + (change if isinstance(base, nn.Linear) else change.T)  # Conv1D's is [inputs, outputs]
            if safe_merge:
                check_merged(name, [merged])
            if self._weight_before_merge is None:
                self._weight_before_merge = base.weight
            # not in place: another module may share the weight
            base.weight = nn.Parameter(merged.to(weight.dtype), requires_grad=False)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the layer's own weight back, bit for bit."""
        if self._weight_before_merge is not None:
            base: Any = self.get_base_layer()
            weight, self._weight_before_merge = self._weight_before_merge, None
            weight.data = weight.data.to(base.weight.device)
            base.weight = weight
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "loretta." + super().__repr__()
