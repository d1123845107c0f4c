"""The tuner that puts bottleneck adapters into a model."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from lightning_peft.backbone.fused import check_called
from lightning_peft.backbone.modules import base_modules
from lightning_peft.tuners.bottleneck.config import BottleneckConfig
from lightning_peft.tuners.bottleneck.layer import BottleneckLayer


class BottleneckModel(BaseTuner):
    """Wraps matrices in `BottleneckLayer`; see `BottleneckConfig`.

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
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - peft's own annotation

    def _prepare_adapter_config(  # type: ignore[override]
        self, peft_config: BottleneckConfig, model_config: dict
    ) -> BottleneckConfig:
        if peft_config.target_modules is None:
            raise ValueError("BottleneckConfig needs target_modules: the matrices whose outputs it adds to.")
        names = {name for name, _ in base_modules(self.model)}
        for name in (name for pair in (peft_config.inputs or {}).items() for name in pair):
            if name not in names:
                raise ValueError(f"The model has no module {name!r}, which the parallel adapter reads or adds to.")
        return peft_config

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, nn.modules.conv._ConvNd):
            raise ValueError(f"{current_key} is a convolution, and a bottleneck adapts matrices.")
        check_called([current_key], self.model)
        # the innermost module of that name: adapters around it come and go
        named = dict(base_modules(self.model))
        source = (peft_config.inputs or {}).get(current_key, current_key)
        owners = (
            m for m in self.model.modules() if isinstance(m, BottleneckLayer) and adapter_name in m.bottleneck_rule
        )
        layer = target if isinstance(target, BottleneckLayer) else BottleneckLayer(target, adapter_name)
        layer.update_layer(
            adapter_name, peft_config, named[source] if source != current_key else None, next(owners, None)
        )
        setattr(parent, target_name, layer)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # peft expects the name to be the last or the last but one in a key, and here a whole network stands under it
        shorter = key.replace(f".bottleneck.{adapter_name}.", ".bottleneck.")
        return shorter if shorter != key else super()._remove_adapter_name_from_key(key, adapter_name)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for module in self.model.modules():
            if isinstance(module, BottleneckLayer):
                module.check_merge(list(self.peft_config))
