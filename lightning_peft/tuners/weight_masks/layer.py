"""The wrapper around one linear layer."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from lightning_peft.backbone.layer_inputs import is_plain
from lightning_peft.backbone.quantization import is_quantized
from lightning_peft.tuners.linear_wrapper import LinearWrapper
from lightning_peft.tuners.weight_deltas.bits import unpack
from lightning_peft.tuners.weight_masks.config import WeightMasksConfig
from lightning_peft.tuners.weight_masks.largest import largest
from lightning_peft.tuners.weight_masks.product import MaskedProduct, factor


class WeightMasksLayer(LinearWrapper):
    """Compute a linear layer with the weight `W ∘ M`, of several adapters `W ∘ M1 ∘ M2`.

    A plain layer is computed anew. One that is quantised, wrapped by another adapter or hooked is called, and what
    masking changes is added to its output: `x (W ∘ (M - 1))ᵀ`.
    """

    adapter_layer_names = ("weight_mask_scores",)
    other_param_names = ("weight_mask_kept", "weight_mask_bits", "scaling", "trained")
    config_name = "WeightMasksConfig"
    acts_alone = True  # it needs to know nothing but its input

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: WeightMasksConfig, name: str) -> None:
        super().__init__(base_layer, "weight masks are for", name)
        self.weight_mask_scores = nn.ParameterDict({})  # [outputs, inputs] each, also where W is stored transposed
        self.weight_mask_kept = BufferDict(persistent=True)  # how many entries the mask keeps
        self.weight_mask_bits = BufferDict(persistent=True)
        self.trained: dict[str, bool] = {}
        self._thresholds: dict[str, float | None] = {}
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config: WeightMasksConfig, name: str) -> None:
        """Give the layer a mask for one more adapter.

        Args:
            adapter_name: the adapter.
            config: its configuration.
            name: the layer's, by which random scores differ between layers.
        """
        shape = (self.out_features, self.in_features)
        entries = self.out_features * self.in_features
        if config.packed:
            self.weight_mask_bits[adapter_name] = torch.zeros(-(-entries // 8), dtype=torch.uint8)
        else:
            scores = torch.zeros(shape)
            if config.criterion == "magnitude":
                scores = self._read()().detach().abs().float()
            elif config.criterion == "random":
                generator = torch.Generator().manual_seed(config.seed ^ zlib.crc32(name.encode()))
                scores = torch.rand(shape, generator=generator)
            self.weight_mask_scores[adapter_name] = nn.Parameter(scores)
            self.weight_mask_kept[adapter_name] = torch.tensor(round(config.density * entries))
        self.scaling[adapter_name] = config.alpha
        self.trained[adapter_name] = config.criterion == "movement"
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def keep_at_most(self, adapter_name: str, density: float) -> None:
        """Let an adapter's mask keep exactly `round(density * entries)` entries from now on, or fewer as it does."""
        self.weight_mask_kept[adapter_name].clamp_(max=round(density * self.out_features * self.in_features))

    def mask(self, adapter_name: str) -> Tensor:
        """Return where an adapter keeps the weight: truth values `[outputs, inputs]`."""
        if adapter_name in self.weight_mask_bits:
            entries = self.out_features * self.in_features
            return unpack(self.weight_mask_bits[adapter_name], entries).reshape(self.out_features, self.in_features)
        scores, kept = self.weight_mask_scores[adapter_name], self.weight_mask_kept[adapter_name]
        if kept.is_meta or type(kept) is not Tensor:  # there are shapes and no values
            return torch.ones_like(scores, dtype=torch.bool)
        mask, threshold = largest(scores, int(kept), self._thresholds.get(adapter_name))
        self._thresholds[adapter_name] = threshold
        return mask

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = self.acting()
        if not active:
            return self.base_layer(x, *args, **kwargs)
        whole = self._is_bare()
        y = None if whole else self.base_layer(x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        base: Any = self.get_base_layer()
        product: Tensor = MaskedProduct.apply(
            x,
            self._read() if is_quantized(base) else self._read()(),
            base.bias.to(x.dtype) if whole and base.bias is not None else None,
            whole,
            tuple(self.mask(name) for name in active),
            tuple(self.scaling[name] for name in active),
            tuple(self.trained[name] for name in active),
            *(self.weight_mask_scores.get(name) for name in active),
        )
        return product if y is None else y + product.to(y.dtype)

    def merged_weight(self, adapter_name: str, weight: Tensor) -> Tensor:
        return weight * factor([self.mask(adapter_name)], [self.scaling[adapter_name]], weight.dtype)

    def _get_available_adapters(self) -> set[str]:
        return set(self.scaling)  # also those without scores

    def _is_bare(self) -> bool:
        """Return whether the layer's call does nothing but multiply, so that it need not be made."""
        base = self.base_layer
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        return is_plain(base) and not hooked and "forward" not in vars(base)

    def _read(self) -> Callable[[], Tensor]:
        """Return what gives the weight `[outputs, inputs]`, dequantised where need be."""
        base: Any = self.get_base_layer()
        if is_quantized(base):
            from lightning_peft.backbone.quantized_layers import weight_of

            return lambda: weight_of(base)
        return lambda: base.weight if isinstance(base, nn.Linear) else base.weight.T

    def __repr__(self) -> str:
        return "weight_masks." + super().__repr__()
