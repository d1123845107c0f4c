"""The tuner that puts LoRTA into a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_peft.backbone.fused import check_called
from lightning_peft.backbone.modules import base_modules
from lightning_peft.backbone.targets import choose_targets
from lightning_peft.tuners.lorta.config import LoRTAConfig
from lightning_peft.tuners.lorta.layer import LoRTALayer
from lightning_peft.tuners.lorta.places import attention_matrices, find_places
from lightning_peft.tuners.targets import default_blocks
from lightning_peft.tuners.tuner import Tuner


class LoRTAModel(Tuner[LoRTAConfig, LoRTALayer]):
    """Wrap the matrices of attentions in `LoRTALayer`; see `LoRTAConfig`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft import get_peft_model
        >>> from lightning_peft.tuners.lorta import LoRTAConfig
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> parameters = get_peft_model(model, LoRTAConfig(r=2)).parameters()
        >>> sum(p.numel() for p in parameters if p.requires_grad), 2 * (32 + 8 + 2 + 4 + 4)
        (100, 100)
    """

    prefix: str = "lorta_"
    tuner_layer_cls = LoRTALayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter in; see peft. The matrices are those of the configuration: few have keys in a saved state."""
        kwargs.pop("state_dict", None)
        super().inject_adapter(model, adapter_name, *args[:2], **kwargs)

    def _check_config(self, config: LoRTAConfig) -> None:
        if config.target_modules is None:
            names, layers = attention_matrices(self.model, None, config.num_heads), default_blocks(config)
            config.target_modules = names if layers is None else choose_targets(self.model, names, layers)
        names = [name for name, _ in base_modules(self.model) if name]
        if config.places is None:
            chosen = [name for name in names if self._check_target_module_exists(config, name)]
            fused: Any = config.fused
            places = find_places(self.model, chosen, fused, config.num_heads)
            config.places = {name: place.as_json() for name, place in places.items()}
        if strange := sorted(config.places.keys() - set(names)):
            raise ValueError(f"The model has no module {strange[0]!r}, which has a place in this LoRTA adapter.")

    def _adapt(
        self, config: LoRTAConfig, adapter_name: str, target: nn.Module, name: str, parent: nn.Module, key: str
    ) -> None:
        check_called([key], self.model)
        place = config.place(key)
        layer = target if isinstance(target, LoRTALayer) else LoRTALayer(target, adapter_name, config, key)
        if (shape := (layer.in_features, layer.out_features)) != place.shape:
            raise ValueError(f"{key} is {shape} (inputs, outputs), but has a place for {place.shape}: another model's.")
        owners = (other for other in self._layers() if other.owns(adapter_name, place.group))
        layer.update_layer(adapter_name, config, place, next(owners, None))
        setattr(parent, name, layer)
