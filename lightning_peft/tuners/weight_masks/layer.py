"""The wrapper around one linear layer."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from lightning_peft.backbone.layer_inputs import is_plain
from lightning_peft.backbone.modules import is_linear
from lightning_peft.backbone.quantization import check_merge, is_quantized
from lightning_peft.backbone.structure import matrix_shape
from lightning_peft.tuners.tuner import TunerLayer, check_merged
from lightning_peft.tuners.weight_deltas.bits import unpack
from lightning_peft.tuners.weight_masks.config import WeightMasksConfig
from lightning_peft.tuners.weight_masks.largest import largest
from lightning_peft.tuners.weight_masks.product import MaskedProduct, factor


class WeightMasksLayer(nn.Module, TunerLayer):
    """Compute a linear layer with the weight `W ∘ M`, of several adapters `W ∘ M1 ∘ M2`.

    A plain layer is computed anew. One that is quantised, wrapped by another adapter or hooked is called, and what
    masking changes is added to its output: `x (W ∘ (M - 1))ᵀ`.
    """

    adapter_layer_names = ("weight_mask_scores",)
    other_param_names = ("weight_mask_kept", "weight_mask_bits", "scaling", "trained")
    acts_alone = True  # it needs to know nothing but its input

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: WeightMasksConfig, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        if not is_linear(base):
            raise ValueError(f"{name} is a {type(base).__name__}, but weight masks are for linear layers.")
        self.in_features, self.out_features = matrix_shape(base)
        self.weight_mask_scores = nn.ParameterDict({})  # [outputs, inputs] each, also where W is stored transposed
        self.weight_mask_kept = BufferDict(persistent=True)  # how many entries the mask keeps
        self.weight_mask_bits = BufferDict(persistent=True)
        self.scaling: dict[str, float] = {}
        self.trained: dict[str, bool] = {}
        self.merged_adapters: list[str] = []
        self._weight_before_merge: nn.Parameter | None = None
        self._thresholds: dict[str, float | None] = {}
        self._active_adapter = adapter_name
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
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters else [a for a in self.active_adapters if a not in self.merged_adapters]
        active = [name for name in active if self.scaling.get(name, 0.0) != 0]
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

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Give the layer the weight `W ∘ M`; its own is kept for `unmerge`."""
        check_merge([self], "WeightMasksConfig")
        base: Any = self.get_base_layer()
        for name in [n for n in check_adapters_to_merge(self, adapter_names) if n in self.scaling]:
            with torch.no_grad():
                multiplied = factor([self.mask(name)], [self.scaling[name]], base.weight.dtype)
                weight = base.weight * (multiplied if isinstance(base, nn.Linear) else multiplied.T)
            if safe_merge:
                check_merged(name, [weight])
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
