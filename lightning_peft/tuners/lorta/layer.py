"""The wrapper around one matrix of an attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.tuners.linear_wrapper import LinearWrapper
from lightning_peft.tuners.lorta.config import TENSORS, LoRTAConfig
from lightning_peft.tuners.lorta.places import Group, Place, Tensors


class LoRTALayer(LinearWrapper):
    """Add a matrix's slice of the CP tensor, `y + alpha/r * B A x` with factors of rank r; see `LoRTAConfig`.

    The first adapted matrix of a group owns the tensor's factors, the others read them there, so that each is one
    parameter, saved once. The matrix itself is not read, so that it may be quantised, or wrapped by another adapter.
    """

    config_name = "LoRTAConfig"
    # all layers have a dropout of each adapter, by which peft knows that they carry it
    adapter_layer_names = (*TENSORS, "lorta_dropout")
    other_param_names = ("scaling", "places", "_owners")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoRTAConfig, name: str) -> None:
        super().__init__(base_layer, "LoRTA adapts", name)
        self.lorta_A = nn.ParameterDict({})
        self.lorta_B = nn.ParameterDict({})
        self.lorta_layers = nn.ParameterDict({})
        self.lorta_heads = nn.ParameterDict({})
        self.lorta_matrices = nn.ParameterDict({})
        self.lorta_dropout = nn.ModuleDict({})
        self.places: dict[str, Place] = {}
        # in tuples, out of sight of nn.Module, since an owner is no child
        self._owners: dict[str, tuple[LoRTALayer]] = {}
        self._active_adapter = [adapter_name]

    @property
    def acts_alone(self) -> bool:
        """True where the layer needs nothing but its own input."""
        return all(owner is self for (owner,) in self._owners.values())

    def update_layer(self, adapter_name: str, config: LoRTAConfig, place: Place, owner: LoRTALayer | None) -> None:
        """Give the layer one more adapter.

        Args:
            adapter_name: its name.
            config: its configuration.
            place: where the matrix stands in the tensor.
            owner: the layer that holds the tensor's factors; None: this one is to hold them.
        """
        self.scaling[adapter_name], self.places[adapter_name] = config.scaling, place
        self.lorta_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self._owners[adapter_name] = (owner or self,)
        if owner is None:
            for tensor, shape in config.shapes(place.group).items():
                getattr(self, tensor)[adapter_name] = nn.Parameter(torch.empty(shape))
            self.reset_parameters(adapter_name, config.init_scale)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, adapter_name: str, init_scale: float) -> None:
        """Draw the factors that the layer owns: B zero, the others uniform, with the rank as the number of inputs."""
        nn.init.kaiming_uniform_(self.lorta_A[adapter_name], a=math.sqrt(5))
        nn.init.zeros_(self.lorta_B[adapter_name])
        for factors in (self.lorta_layers, self.lorta_heads, self.lorta_matrices):
            nn.init.kaiming_uniform_(factors[adapter_name], a=math.sqrt(5) * init_scale)

    def owns(self, adapter_name: str, group: Group) -> bool:
        """Return whether the layer holds the factors of an adapter's tensor for a group of matrices."""
        return adapter_name in self.lorta_A and self.places[adapter_name].group == group

    def factors(self, adapter_name: str, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Return A `[r, inputs]` and B `[outputs, r]` of what an adapter adds to the matrix at strength 1."""
        (owner,) = self._owners[adapter_name]
        shared = (getattr(owner, tensor)[adapter_name] for tensor in TENSORS)
        return self.places[adapter_name].low_rank(Tensors(*(tensor.to(device) for tensor in shared)))

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return what an adapter adds to the weight, `[outputs, inputs]`."""
        a, b = self.factors(adapter_name)
        return self.scaling[adapter_name] * (b @ a)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        acting = self.acting()
        y = self.base_layer(x, *args, **kwargs)
        for name in acting:
            a, b = self.factors(name, x.device)
            z = self.lorta_dropout[name](x.to(a.dtype))
            change = nn.functional.linear(nn.functional.linear(z, a), b)
            y = y + (self.scaling[name] * change).to(y.dtype)
        return y

    def merged_weight(self, adapter_name: str, weight: Tensor) -> Tensor:
        return weight + self.get_delta_weight(adapter_name).to(weight.device)

    def __repr__(self) -> str:
        return "lorta." + super().__repr__()
