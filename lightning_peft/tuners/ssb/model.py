"""The tuner that puts SSB into a model."""

from __future__ import annotations

from torch import nn

from lightning_peft.backbone.fused import check_called
from lightning_peft.tuners.linear_wrapper import fill_in_targets
from lightning_peft.tuners.ssb.config import SSBConfig
from lightning_peft.tuners.ssb.layer import SSBLayer
from lightning_peft.tuners.tuner import Tuner


class SSBModel(Tuner[SSBConfig, SSBLayer]):
    """Wrap linear layers in `SSBLayer`; see `SSBConfig`.

    Example:
        >>> from torch import nn
        >>> from peft import get_peft_model
        >>> from lightning_peft.tuners.ssb import SSBConfig
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> config = SSBConfig(target_modules=["0", "2"])
        >>> sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)
        12
    """

    prefix: str = "ssb_"
    tuner_layer_cls = SSBLayer

    def _check_config(self, config: SSBConfig) -> None:
        fill_in_targets(config, self.model, "SSB could scale")

    def _adapt(
        self, config: SSBConfig, adapter_name: str, target: nn.Module, name: str, parent: nn.Module, key: str
    ) -> None:
        if isinstance(target, SSBLayer):
            target.update_layer(adapter_name, config)
        else:
            check_called([key], self.model)
            setattr(parent, name, SSBLayer(target, adapter_name, config, key))
