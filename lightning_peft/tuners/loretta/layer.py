"""The wrapper around one linear layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_peft.tuners.linear_wrapper import MatrixChangeLayer
from lightning_peft.tuners.loretta.config import LoRETTAConfig
from lightning_peft.tuners.tensor_train import TensorTrain


class LoRETTALayer(MatrixChangeLayer):
    """Add `alpha/r * B A x` to a linear layer's output, A and B tensor trains that are never multiplied out whole.

    The weight itself is not read, so that it may be quantised, or wrapped by another adapter.
    """

    adapter_layer_names = ("loretta_A", "loretta_B")
    other_param_names = ("scaling", "loretta_dropout")
    config_name = "LoRETTAConfig"

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoRETTAConfig, name: str) -> None:
        super().__init__(base_layer, "LoRETTA", name)
        self.loretta_A = nn.ModuleDict({})
        self.loretta_B = nn.ModuleDict({})
        self.loretta_dropout = nn.ModuleDict({})
        self._active_adapter = [adapter_name]
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

    def change(self, adapter_name: str) -> Tensor:
        a, b = self.trains(adapter_name)
        return b.matrix() @ a.matrix()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        acting = self.acting()
        y = self.base_layer(x, *args, **kwargs)
        for name in acting:
            a, b = self.trains(name)
            change = b(a(self.loretta_dropout[name](x.to(a.cores[0].dtype))))
            y = y + (self.scaling[name] * change).to(y.dtype)
        return y

    def __repr__(self) -> str:
        return "loretta." + super().__repr__()
