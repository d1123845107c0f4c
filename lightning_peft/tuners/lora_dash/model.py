"""The tuner that puts LoRA-Dash into a model."""

from __future__ import annotations

from torch import nn

from lightning_peft.backbone.fused import check_called
from lightning_peft.tuners.linear_wrapper import fill_in_targets
from lightning_peft.tuners.lora_dash.config import LoRADashConfig
from lightning_peft.tuners.lora_dash.layer import LoRADashLayer
from lightning_peft.tuners.tuner import Tuner


class LoRADashModel(Tuner[LoRADashConfig, LoRADashLayer]):
    """Wrap linear layers in `LoRADashLayer`; see `LoRADashConfig`.

    Example:
        >>> from torch import nn
        >>> from peft import get_peft_model
        >>> from lightning_peft.tuners.lora_dash import LoRADashConfig
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> config = LoRADashConfig(target_modules=["0", "2"])
        >>> sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)
        101
    """

    prefix: str = "dash_"
    tuner_layer_cls = LoRADashLayer

    def _check_config(self, config: LoRADashConfig) -> None:
        fill_in_targets(config, self.model, "LoRADash could change")

    def _adapt(
        self,
        config: LoRADashConfig,
        adapter_name: str,
        target: nn.Module,
        name: str,
        parent: nn.Module,
        key: str,
    ) -> None:
        if isinstance(target, LoRADashLayer):
            target.update_layer(adapter_name, config)
        else:
            check_called([key], self.model)
            setattr(parent, name, LoRADashLayer(target, adapter_name, config, key))
