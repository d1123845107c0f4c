"""The base of tuner layers that wrap a linear layer and can give it another weight."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from lightning_peft.backbone.linear_layers import linear_layers
from lightning_peft.backbone.modules import is_linear
from lightning_peft.backbone.quantization import check_merge
from lightning_peft.backbone.structure import matrix_shape
from lightning_peft.backbone.targets import choose_targets
from lightning_peft.tuners.targets import Targeting, default_blocks
from lightning_peft.tuners.tuner import TunerLayer, check_merged


class LinearWrapper(nn.Module, TunerLayer):
    """Wrap a linear layer; merged, it has the weight that its adapters make of its own, which comes back unmerged.

    Args:
        base_layer: the layer, or another adapter's wrapper around it.
        does: what the method does to linear layers, for messages: "SSB scales".
        key: the layer's name in them.
    """

    config_name: str

    def __init__(self, base_layer: nn.Module, does: str, key: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        if not is_linear(base):
            raise ValueError(f"{key} is a {type(base).__name__}, but {does} linear layers.")
        self.in_features, self.out_features = matrix_shape(base)
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._weight_before_merge: nn.Parameter | None = None
        self._active_adapter: list[str] = []

    @abstractmethod
    def merged_weight(self, adapter_name: str, weight: Tensor) -> Tensor:
        """Return what an adapter, at its strength, makes of a weight `[outputs, inputs]`."""

    def acting(self) -> list[str]:
        """Return the adapters that act beside the base layer: active, not merged, and turned on at all."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        active = [name for name in self.active_adapters if name not in self.merged_adapters]
        return [name for name in active if self.scaling.get(name)]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Give the layer the changed weight; its own is kept for `unmerge`. Adapters inside come first."""
        check_merge([self], self.config_name)
        base: Any = self.get_base_layer()
        turned = not isinstance(base, nn.Linear)  # Conv1D's weight is [inputs, outputs]
        for name in [n for n in check_adapters_to_merge(self, adapter_names) if n in self.scaling]:
            with torch.no_grad():
                weight = base.weight.detach()
                merged = self.merged_weight(name, weight.T).T if turned else self.merged_weight(name, weight)
            if safe_merge:
                check_merged(name, [merged])
            if self._weight_before_merge is None:
                self._weight_before_merge = base.weight
            # not in place: another module may share the weight
            base.weight = nn.Parameter(merged.to(base.weight.dtype).contiguous(), requires_grad=False)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the layer's own weight back, bit for bit."""
        if self._weight_before_merge is not None:
            base: Any = self.get_base_layer()
            weight, self._weight_before_merge = self._weight_before_merge, None
            weight.data = weight.data.to(base.weight.device)
            base.weight = weight
        self.merged_adapters.clear()


class MatrixChangeLayer(LinearWrapper):
    """Wrap a linear layer, and add `scaling * change(adapter)` to what its weight does.

    Args:
        base_layer: the layer, or another adapter's wrapper around it.
        method: what to call the method in messages.
        key: the layer's name in them.
    """

    acts_alone = True  # it needs to know nothing but its input

    def __init__(self, base_layer: nn.Module, method: str, key: str) -> None:
        super().__init__(base_layer, f"{method} changes", key)

    @abstractmethod
    def change(self, adapter_name: str) -> Tensor:
        """Return the matrix `[outputs, inputs]` that an adapter adds to the weight at strength 1."""

    def merged_weight(self, adapter_name: str, weight: Tensor) -> Tensor:
        return weight + self.scaling[adapter_name] * self.change(adapter_name).to(weight.device)


def fill_in_targets(config: Targeting, model: nn.Module, does: str) -> None:
    """Let a configuration that names no targets mean the linear layers of the model's blocks.

    Args:
        config: the configuration.
        model: the model.
        does: what the method could do to them, for messages: "SSB could scale".

    Raises:
        ValueError: there are none, or the list of targets is empty.
    """
    if config.target_modules is None:
        names, layers = linear_layers(model), default_blocks(config)
        config.target_modules = names if layers is None else choose_targets(model, names, layers)
    if not config.target_modules:
        raise ValueError(
            f"{type(model).__name__} has no linear layers that {does}, or target_modules is empty: name them, or give "
            "a regular expression."
        )
