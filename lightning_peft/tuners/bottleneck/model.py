"""The tuner that puts bottleneck adapters into a model."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lightning_peft.backbone.fused import check_called
from lightning_peft.backbone.modules import base_modules
from lightning_peft.backbone.parts import part_ends
from lightning_peft.tuners.bottleneck.config import BottleneckConfig
from lightning_peft.tuners.bottleneck.layer import BottleneckLayer
from lightning_peft.tuners.targets import default_blocks
from lightning_peft.tuners.tuner import Tuner


class BottleneckModel(Tuner[BottleneckConfig, BottleneckLayer]):
    """Wrap matrices in `BottleneckLayer`; see `BottleneckConfig`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft import get_peft_model
        >>> from lightning_peft.tuners.bottleneck import BottleneckConfig
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> config = BottleneckConfig(target_modules=["down_proj"], size=4)
        >>> sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)
        292
    """

    prefix: str = "bottleneck"
    tuner_layer_cls = BottleneckLayer

    def _check_config(self, config: BottleneckConfig) -> None:
        if config.target_modules is None:
            parts = part_ends(self.model, attention=False, layers=default_blocks(config))
            config.target_modules = list(config.sites()) or [part.last for part in parts]
        names = {name for name, _ in base_modules(self.model)}
        for name in (name for pair in config.sites().items() for name in pair):
            if name not in names:
                raise ValueError(
                    f"The model has no module {name!r}, which the {config.placement} adapter reads or adds to."
                )

    def _adapt(
        self, config: BottleneckConfig, adapter_name: str, target: nn.Module, name: str, parent: nn.Module, key: str
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, nn.modules.conv._ConvNd):
            raise ValueError(f"{key} is a convolution, and a bottleneck adapts matrices.")
        check_called([key], self.model)
        # the innermost module of that name: adapters around it come and go
        named = dict(base_modules(self.model))
        site = config.sites().get(key)
        if site is None and config.placement == "stream":
            raise ValueError(f"outputs and norms name no module for {key}: name one, or leave it out of the targets.")
        owners = (layer for layer in self._layers() if adapter_name in layer.bottleneck_rule)
        layer = target if isinstance(target, BottleneckLayer) else BottleneckLayer(target, adapter_name)
        own = site is None or (site == key and config.placement == "parallel")
        module = None if own else named[site or key]
        layer.update_layer(adapter_name, config, module, next(owners, None), norm=key in (config.norms or {}))
        setattr(parent, name, layer)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        layers = self._layers()
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for layer in layers:
            for name in list(layer.configs):
                layer.leave_sites(name)
        return model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # peft expects the name to be the last or the last but one in a key, and here a whole network stands under it
        shorter = key.replace(f".bottleneck.{adapter_name}.", ".bottleneck.")
        return shorter if shorter != key else super()._remove_adapter_name_from_key(key, adapter_name)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for layer in self._layers():
            layer.check_merge(list(self.peft_config))
